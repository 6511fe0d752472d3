"""What a fine-tuning command asks for, and one of its runs: frozen dataclasses.

A command is a grid: methods x learning rates x seeds. Each point is one `RunConfig`, which holds
everything that decides the final parameters, and nothing else: it is the identity of a run folder.
The defaults are the set-up of the paper's GLUE table, except the epochs of the embedded task and
the learning rates: the paper's is 1e-4 for all.
"""

import dataclasses
import math
import pathlib
from typing import Annotated, Literal

import tyro

from experiments import checks, storage

# Each method's own peak rate: one shared rate would suit some and leave the others untrained. Those
# of LoRA, full and factored mode and Muon are from SST-2 (docs/results.md); the other three are not
# swept.
RATES = {
    "full": 1e-4,
    "full-muon": 1e-4,
    "lora": 3e-3,
    "lorapro-full": 3e-4,
    "lorapro-factored": 3e-4,
    "lorapro-muon": 1e-3,
    "lorapro-adamw": 3e-3,
}


def _list_of(kind: type, metavar: str) -> tyro.constructors.PrimitiveConstructorSpec:
    """Reads `a,b,c` as a tuple."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda args: tuple(kind(x.strip()) for x in args[0].split(",")),
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value)) if value else str(value)],
    )


# pathlib would read gs://bucket as gs:/bucket.
_PATH = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="PATH",
    instance_from_str=lambda args: storage.at(args[0]),
    is_instance=lambda value: isinstance(value, pathlib.PurePath),
    str_from_instance=lambda value: [str(value)],
)


# A rate as the names of run folders have it, to six digits.
rate_name = "{:g}".format


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained."""

    model: str = "minilm"
    """smollm2 (a pretrained language model), llama (any Llama, Qwen2 or Qwen3), minilm (a
    pretrained encoder), t5 (text to text); llama-tiny, tiny and t5-tiny are random, for tests."""
    weights: str | None = None
    """For llama and t5: a folder as Hugging Face keeps such a model, or NAME@COMMIT on its hub; for
    llama a .gguf file too. None: for t5, t5-base."""
    remat: bool = False
    """The backward pass computes every layer anew, for memory (XLA undoes it on a CPU)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the activations; parameters and optimizer state are float32."""
    quantize: Literal["none", "nf4", "int4", "int8"] = "none"
    """QLoRA: hold the frozen kernels of a language model in blocks of 4 or 8 bits."""

    @property
    def quantized(self) -> Literal["nf4", "int4", "int8"] | None:
        """What --quantize says; None: the kernels are dense."""
        return None if self.quantize == "none" else self.quantize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What it learns."""

    task: str | None = None
    """Of an encoder or text to text: pydoc (embedded, no download), or a GLUE task: cola, mrpc,
    sst2, rte, qnli, mnli. Of a language model: docstrings (embedded), e2e or gsm8k. None: the
    embedded one."""
    data: str | None = None
    """For a language model, in place of a task: a file of your own, each line {"prompt": ...,
    "completion": ...} or {"messages": [{"role": ..., "content": ...}, ...]}."""
    validation_data: str | None = None
    """The same, for validation; None: a tenth of --data, at most 500 lines."""
    plain: bool = False
    """Write prompt and answer of a language model one a line, without its chat template."""
    label_smoothing: checks.Share = 0.0
    """Share of a language model's target that is spread over the vocabulary, in training."""
    max_length: Annotated[int, checks.Range(3)] = 128  # [CLS], a token, [SEP]
    """Tokens per example; longer ones are cut, or, of a language model, left out."""
    train_examples: Annotated[int, checks.Range(0)] = 0
    """Train on a subset of this size, drawn by the seed; 0: all."""
    eval_examples: Annotated[int, checks.Range(0)] = 0
    """Evaluate on a subset of this size, the same for every seed; 0: all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """What a language model writes at every evaluation."""

    answers: Annotated[int, checks.Range(0)] = 10
    """Validation prompts that are answered, the same for every run; the task's scores are of them;
    0: none."""
    max_new_tokens: checks.Count | None = None
    """Tokens of an answer at most; None: the task's own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """How an answer is searched for."""

    beams: checks.Count = 1
    """Beams of the search; 1: the likeliest token at every step."""
    length_penalty: Annotated[float, checks.Range(-100.0, 100.0)] = 1.0
    """A beam's log-likelihood is divided by its length to this power."""
    no_repeat_ngram: Annotated[int, checks.Range(0)] = 0
    """No sequence of so many tokens comes twice in an answer; 0: any may."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """The low-rank factors of every method but full."""

    rank: checks.Count = 8
    """Rank r of the adapters."""
    alpha: checks.Positive = 16.0
    """The adapters' scale is alpha / r."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead."""
    dropout: checks.Share = 0.0
    """On the adapters' input, and on the encoder's pooled features or everywhere in a T5."""
    targets: str | None = None
    """The linear layers with an adapter, a regular expression on their whole paths, of a language
    model on their names in a layer, such as "q|v"; None: all of the model's blocks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Batches, schedule and Adam."""

    epochs: checks.Count | None = None
    """Passes over the training data; None: 2 for pydoc, 1 (the paper's) for the others."""
    batch_size: Annotated[checks.Count, tyro.conf.arg(aliases=("--bs",))] = 32
    """Examples per step."""
    accumulate: checks.Count = 1
    """Parts that a step's examples are worked through in, for memory; the step is the same."""
    head_learning_rate: checks.Positive | None = None
    """Peak rate of the fresh classification head in the LoRA methods; None: the adapters' rate."""
    warmup_ratio: checks.Share = 0.03
    """Share of the steps over which the rate rises."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the rate falls to 0 after that."""
    clip_norm: checks.NotNegative = 1.0
    """Bound on the global norm of the raw gradients; 0: none."""
    weight_decay: Annotated[checks.NotNegative, tyro.conf.arg(aliases=("--wd",))] = 0.0
    """Decoupled decay; for lorapro-full and lorapro-factored, of the adapters' product."""
    b1: checks.Share = 0.9
    """Adam's decay of the first moment."""
    b2: checks.Share = 0.999
    """Adam's decay of the second moment."""
    eps: checks.Positive = 1e-8
    """Adam's epsilon."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Optimizer, Adapter, Search, Answers, Data, Model):
    """What all runs of a command share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Training):
    """One run: one method, learning rate and seed, with task and epochs settled."""

    task: str
    method: str
    learning_rate: float
    seed: int
    epochs: int
    data_sha256: str | None = None  # of the user's own files

    @property
    def folder_name(self) -> str:
        """<task>-<model>-<method>-lr<rate>-seed<seed>."""
        rate = rate_name(self.learning_rate)
        return f"{self.task}-{self.model}-{self.method}-lr{rate}-seed{self.seed}"

    @property
    def shared(self) -> "RunConfig":
        """The configuration without rates and seed: of all runs that can share their programs."""
        return dataclasses.replace(self, learning_rate=1.0, head_learning_rate=None, seed=0)

    @property
    def scale(self) -> float:
        """The s of K0 + s a b."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Which runs are made, and where they read and write."""

    config: str | None = None
    """A module of experiments/configs, which has the defaults of the other flags:
    smollm2_docstrings, smollm2_e2e, smollm2_e2e_lora_paper, minilm_pydoc, minilm_sst2, t5_glue."""
    smoke: bool = False
    """A few seconds of the same on a random tiny model, and on its embedded task unless data are
    given; it sets epochs, batches, lengths and examples, and takes the first seed."""
    methods: Annotated[tuple[str, ...], _list_of(str, "NAME,NAME,...")] = tuple(
        name for name in RATES if name != "full-muon"
    )
    """Any of full, lora, lorapro-full, lorapro-factored, lorapro-muon, lorapro-adamw, and full-muon
    (optax.contrib.muon), which is slow on a CPU."""
    learning_rates: Annotated[
        tuple[checks.Positive, ...] | None,
        _list_of(float, "RATE,RATE,..."),
        tyro.conf.arg(aliases=("--lr",)),
    ] = None
    """Peak learning rates; every method is run with each. None: each method's own."""
    seeds: Annotated[
        tuple[Annotated[int, checks.Range(0, 2**32 - 1)], ...], _list_of(int, "N,N,...")
    ] = (0,)
    """Each decides a run's head, adapters, order of the data and dropout."""
    data_dir: str | None = None
    """Where the prepared GLUE tasks are, a folder or gs://...; pydoc needs none."""
    out: Annotated[storage.Path, _PATH] = pathlib.Path("runs/finetune")
    """Folder of the run folders, results.jsonl and the plots; or gs://..., which needs gcsfs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid(Training, Run):
    """Runs of several methods, learning rates and seeds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What is measured and saved, and when."""

    checkpoint_every: Annotated[int, checks.Range(0)] = 100
    """Steps between checkpoints, written while training goes on; 0: none before the end."""
    keep: checks.Count = 2
    """Checkpoints of a run that are kept until it is complete: the last ones."""
    evaluate_every: Annotated[int, checks.Range(0)] = 0
    """Steps between evaluations, beside those at the end of every epoch; 0: no others."""
    diagnose_every: Annotated[int, checks.Range(0)] = 0
    """Steps between measurements of how close the steps are to full fine-tuning's; 0: never."""
    tensorboard: bool = False
    """Write what metrics.jsonl holds for TensorBoard too."""
    profile_steps: Annotated[tuple[checks.Count, ...] | None, _list_of(int, "FIRST,LAST")] = None
    """Steps to trace with JAX's profiler, into the run's folder."""
    export: Literal["none", "peft", "merged"] = "none"
    """Into a complete run's folder, also if it was complete before, for transformers: peft/ with
    the adapters as PEFT reads them, or merged/ with the whole model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """The devices and processes that share a run."""

    devices: checks.Count | None = None
    """Devices of this process that share every batch; None: one, or all if it is distributed."""
    fsdp: checks.Count = 1
    """Devices that share every parameter too, each holding a part: a divisor of all devices."""
    distributed: bool = False
    """This is one of several processes, which share --out; the cluster (Slurm, MPI, TPU) tells it
    the following three, or they are given, or stand in JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
    and JAX_PROCESS_ID; the first of which asks for this as the flag does."""
    coordinator: str | None = None
    """host:port at which process 0 will listen."""
    num_processes: checks.Count | None = None
    """How many there are."""
    process_id: Annotated[int, checks.Range(0)] | None = None
    """Which this is, from 0."""
    timeout: checks.Count = 100
    """Seconds without a sign of life after which a process counts as dead, and all end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Device, Record, Grid):
    """Fine-tune a pretrained model by several methods and compare them.

    Example: python -m experiments.finetune --methods full,lora,lorapro-factored
    """
