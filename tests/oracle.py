"""The dense truth in float64 numpy: J as a matrix, pseudo-inverses, each mode by its definition.

Everything takes batches of pairs: a (..., m, r), b (..., r, n), G (..., m, n).
"""

import numpy as np


def transposed(x):
    return np.swapaxes(x, -1, -2)


def norm(x):
    """Frobenius norms of a batch of matrices, whatever size their entries have."""
    largest = np.max(np.abs(x), axis=(-1, -2), initial=0, keepdims=True)
    unit = x / np.where(largest > 0, largest, 1)
    return largest[..., 0, 0] * np.sqrt(np.sum(unit * unit, axis=(-1, -2)))


def pair(rng, m, r, n):
    """Random factors and a full gradient."""
    return rng.normal(size=(m, r)), rng.normal(size=(r, n)), rng.normal(size=(m, n))


def conditioned(rng, rows, cols, kappa, rank=None):
    """A matrix whose nonzero singular values, `rank` of them or all, go from 1 to 1/κ."""
    k = min(rows, cols) if rank is None else rank
    u, v = (np.linalg.qr(rng.normal(size=(size, k)))[0] for size in (rows, cols))
    return (u * np.geomspace(1, 1 / kappa, k)) @ v.T


def factor_gradients(a, b, G, s):
    """What autodiff gives: (s G bᵀ, s aᵀ G)."""
    return s * G @ transposed(b), s * transposed(a) @ G


def jacobian(a, b, s):
    """J as an (m n, m r + r n) matrix acting on the row-major (da, db)."""
    m, r = a.shape
    n = b.shape[1]
    left = np.einsum("ij,kl->iljk", np.eye(m), b)  # d(da b)_il / d da_jk
    right = np.einsum("ik,lj->ilkj", a, np.eye(n))  # d(a db)_il / d db_kj
    return s * np.concatenate([left.reshape(m * n, m * r), right.reshape(m * n, r * n)], axis=1)


def minimum_norm_solution(a, b, D, s):
    """J⁺ D by a dense pseudo-inverse."""
    z = np.linalg.pinv(jacobian(a, b, s), rcond=1e-11) @ D.ravel()
    return z[: a.size].reshape(a.shape), z[a.size :].reshape(b.shape)


def least_of_family(a, b, da, db):
    """The least of all (da + a Z, db - Z b), by dense least squares for Z."""
    r = a.shape[1]
    move = np.concatenate([np.kron(a, np.eye(r)), -np.kron(np.eye(r), b.T)])
    Z = np.linalg.lstsq(move, -np.concatenate([da.ravel(), db.ravel()]), rcond=1e-11)[0]
    Z = Z.reshape(r, r)
    return da + a @ Z, db - Z @ b


def projection(a, b, G):
    """P_a G + G P_b - P_a G P_b, the part of G in the tangent space of a b."""
    P_a, P_b = a @ np.linalg.pinv(a), np.linalg.pinv(b) @ b
    return P_a @ G + G @ P_b - P_a @ G @ P_b


def sylvester_minimiser(a, b, h_a, h_b, s):
    """Theorem 2.1 with the Sylvester X, in the paper's letters (B = a, A = b)."""
    from scipy.linalg import solve_sylvester

    P, Q = a.T @ a, b @ b.T
    X = solve_sylvester(P, Q, -np.linalg.solve(P, h_b @ b.T) / s**2)
    db = np.linalg.solve(P, h_b) / s**2 + X @ b
    residual = h_a - a @ np.linalg.solve(P, a.T @ h_a)
    da = np.linalg.solve(Q, residual.T).T / s**2 - a @ X
    return da, db


def step(a, b, da, db, s):
    """J(da, db): the linear change of the product."""
    return s * (da @ b + a @ db)


def ridge(a, b, damping, eps):
    """λ (..., 1, 1) of a pair, in a dtype whose rounding is `eps`."""
    trace = np.maximum(np.sum(a * a, axis=(-1, -2)), np.sum(b * b, axis=(-1, -2)))
    relative = max(damping / a.shape[-1], 8 * eps)
    return relative * np.where(trace > 0, trace, 1)[..., None, None]


class Damped:
    """P_a = a (aᵀa + λ)⁻¹ aᵀ and P_b alike: projections but for the damping."""

    def __init__(self, a, b, s, damping=1e-6, eps=2.0**-52):
        self.a, self.b, self.s = a, b, s
        self.floor = ridge(a, b, damping, eps)
        eye = self.floor * np.eye(a.shape[-1])
        self.P, self.Q = (
            np.linalg.inv(transposed(a) @ a + eye),
            np.linalg.inv(b @ transposed(b) + eye),
        )

    def left(self, U):
        return self.a @ (self.P @ (transposed(self.a) @ U))

    def right(self, U):
        return ((U @ transposed(self.b)) @ self.Q) @ self.b

    def nearest(self, U):
        """The tangent vector P_a U + U P_b - P_a U P_b."""
        rest = U - self.right(U)
        return U - rest + self.left(rest)

    def factors(self, U):
        """(da, db) of U's tangent vector; the larger factor's partner takes what both reach."""
        a_larger = np.sum(self.a**2) >= np.sum(self.b**2)
        rest_a, rest_b = (U - self.left(U), U) if a_larger else (U, U - self.right(U))
        return rest_a @ transposed(self.b) @ self.Q / self.s, self.P @ transposed(
            self.a
        ) @ rest_b / self.s

    def of_gradients(self, h_a, h_b):
        """The same of the G that h_a = s G bᵀ and h_b = s aᵀ G know, and its three parts."""
        along_b = h_a @ self.Q @ self.b / self.s
        along_a = self.a @ self.P @ h_b / self.s
        core = self.right(along_a)
        return along_b - core, core, along_a - core

    def size(self, U):
        """sqrt(<U, T> / (m n)) of the T nearest to U: its root mean square, or more if damped."""
        return np.sqrt(np.mean(U * self.nearest(U), axis=(-1, -2)))

    def size_of_gradients(self, h_a, h_b):
        """The same of the G that the factors' gradients know."""
        rest = h_b - self.right(h_b)
        inner = np.sum(h_a @ self.Q * h_a, axis=(-1, -2)) + np.sum(
            self.P @ h_b * rest, axis=(-1, -2)
        )
        return np.sqrt(inner / (h_a.shape[-2] * h_b.shape[-1])) / self.s

    def means_of_squares(self, h_a, h_b):
        """Row and column means of g~², in coordinates of the frames."""
        in_b, _, in_a = self.of_gradients(h_a, h_b)
        m, n = in_b.shape[-2:]
        row = np.sum(h_a @ self.Q * h_a, axis=-1) / self.s**2 + np.sum(in_a**2, axis=-1)
        col = np.sum(self.P @ h_b * h_b, axis=-2) / self.s**2 + np.sum(in_b**2, axis=-2)
        return row / n, col / m


def clip(direction, size, threshold):
    if threshold is None:
        return direction
    return direction * np.minimum(1, threshold / np.where(size > 0, size, 1))[..., None, None]


class Adam:
    """Adam's direction for one array, by the book, bias correction from step 1."""

    def __init__(self, shape, b1=0.9, b2=0.999, eps=1e-8):
        self.m, self.v = np.zeros(shape), np.zeros(shape)
        self.b1, self.b2, self.eps, self.t = b1, b2, eps, 0

    def __call__(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        m_hat = self.m / (1 - self.b1**self.t)
        return m_hat / (np.sqrt(self.v / (1 - self.b2**self.t)) + self.eps)


class Mode:
    """The direction of a mode, dense, of each step's factors and their gradients."""

    def __init__(self, s, *, b1=0.9, b2=0.999, eps=1e-8, floor=0.1, clip=1.0, damping=1e-6,
                 rounding=2.0**-52):  # fmt: skip
        self.s, self.b1, self.b2, self.eps, self.floor = s, b1, b2, eps, floor
        self.clip, self.damping, self.rounding, self.t, self.state = clip, damping, rounding, 0, ()

    def __call__(self, a, b, h_a, h_b):
        self.t += 1
        f = Damped(a, b, self.s, self.damping, self.rounding)
        U = self.unclipped(f, h_a, h_b)
        return clip(f.nearest(U), f.size(U), self.clip)

    def average(self, now, decay):
        """The exponential averages of the arrays `now`, and what makes them unbiased."""
        old = self.state or [np.zeros_like(x) for x in now]
        self.state = [d * x + (1 - d) * y for d, x, y in zip(decay, old, now, strict=True)]
        return [x / (1 - d**self.t) for d, x in zip(decay, self.state, strict=True)]


class Full(Mode):
    """U = m^ / (sqrt(v^ + floor² size²) + eps), with size² the mean of g~² over entries, steps."""

    def unclipped(self, f, h_a, h_b):
        in_b, core, in_a = f.of_gradients(h_a, h_b)
        G = in_b + core + in_a
        size = f.size_of_gradients(h_a, h_b)
        m, v, size = self.average([G, G * G, size**2], [self.b1, self.b2, self.b2])
        return m / (np.sqrt(v + self.floor**2 * size[..., None, None]) + self.eps)


class Factored(Mode):
    """U = D_R T D_C / (size + eps): T of the averages of h_a and h_b, D of those of g~²'s means."""

    def unclipped(self, f, h_a, h_b):
        row, col = f.means_of_squares(h_a, h_b)
        decay = [self.b1, self.b1, self.b2, self.b2]
        mu_a, mu_b, row, col = self.average([h_a, h_b, row, col], decay)
        mean = np.mean(row, axis=-1, keepdims=True)
        left, right = (1 / np.sqrt(x / np.where(mean > 0, mean, 1) + self.floor)
                       for x in (row, col))  # fmt: skip
        U = left[..., :, None] * sum(f.of_gradients(mu_a, mu_b)) * right[..., None, :]
        return U / (np.sqrt(mean)[..., None] + self.eps)


class Muon(Mode):
    """rms sqrt((m + n) / 2) msign(T), T of the average of h_a and h_b, looked ahead by one step.

    msign by the polynomial that the library applies, on singular values.
    """

    def __init__(self, s, *, beta=0.95, nesterov=True, rms=0.2, damping=1e-6, rounding=2.0**-52):
        super().__init__(s, clip=None, damping=damping, rounding=rounding)
        self.beta, self.nesterov, self.rms = beta, nesterov, rms

    def unclipped(self, f, h_a, h_b):
        old = self.state or [np.zeros_like(x) for x in (h_a, h_b)]

        def mean(now, average):
            return self.beta * average + (1 - self.beta) * now

        self.state = [mean(*x) for x in zip((h_a, h_b), old, strict=True)]
        ahead = [mean(*x) for x in zip((h_a, h_b), self.state, strict=True)]
        T = f.nearest(sum(f.of_gradients(*(ahead if self.nesterov else self.state))))
        size = norm(T)
        U, sigma, V = np.linalg.svd(T / np.where(size > 0, size, 1)[..., None, None], False)
        for c1, c2, c3 in [(3.4445, -4.775, 2.0315)] * 6 + [(1.875, -1.25, 0.375)] * 2:
            sigma = c1 * sigma + c2 * sigma**3 + c3 * sigma**5
        (m, n), length = T.shape[-2:], self.rms * np.sqrt(sum(T.shape[-2:]) / 2)
        self.clip = length * np.sqrt(min(m, n, 2 * h_a.shape[-1]) / (m * n))  # no norm is larger
        return length * (U * sigma[..., None, :]) @ V


MODES = {"full": Full, "factored": Factored, "muon": Muon}
