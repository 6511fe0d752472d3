"""The dense float64 truth: the whole gradient G, J as a matrix, pseudo-inverses. numpy only."""

import numpy as np


def pair(rng, m, r, n, rank_a=None, rank_b=None):
    """Random factors and a full gradient; `rank_a` or `rank_b` below r makes them deficient."""

    def factor(rows, cols, rank):
        if rank is None:
            return rng.normal(size=(rows, cols))
        return rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, cols)) / np.sqrt(max(rank, 1))

    return factor(m, r, rank_a), factor(r, n, rank_b), rng.normal(size=(m, n))


def factor_gradients(a, b, G, s):
    """What autodiff gives: (s G bᵀ, s aᵀ G)."""
    return s * G @ b.T, s * a.T @ G


def jacobian(a, b, s):
    """J as an (m n, m r + r n) matrix acting on the row-major (da, db)."""
    m, r = a.shape
    n = b.shape[1]
    left = np.einsum("ij,kl->iljk", np.eye(m), b)  # d(da b)_il / d da_jk
    right = np.einsum("ik,lj->ilkj", a, np.eye(n))  # d(a db)_il / d db_kj
    return s * np.concatenate([left.reshape(m * n, m * r), right.reshape(m * n, r * n)], axis=1)


def split(vector, a, b):
    """The stacked vector of the two updates as (da, db)."""
    return vector[: a.size].reshape(a.shape), vector[a.size :].reshape(b.shape)


def damping_of(a, b, damping):
    """λ: the relative damping in the units of the Grams."""
    return damping * max(np.sum(a * a), np.sum(b * b)) / a.shape[1]


def damped_solution(a, b, G, s, damping):
    """(JᵀJ + mu I)⁻¹ Jᵀ G by a dense solve."""
    J = jacobian(a, b, s)
    mu = s**2 * damping_of(a, b, damping)
    return split(np.linalg.solve(J.T @ J + mu * np.eye(J.shape[1]), J.T @ G.ravel()), a, b)


def minimum_norm_solution(a, b, G, s):
    """J⁺ G by a dense pseudo-inverse."""
    return split(np.linalg.pinv(jacobian(a, b, s), rcond=1e-11) @ G.ravel(), a, b)


def projection(a, b, G):
    """P_a G + G P_b - P_a G P_b, the part of G in the tangent space of a b."""
    P_a = a @ np.linalg.pinv(a)
    P_b = np.linalg.pinv(b) @ b
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


class Factored:
    """Factored mode's direction, with T and v^ as (m, n) arrays, from the full gradient."""

    def __init__(self, shape, b1=0.9, b2=0.999, eps=1e-8):
        self.T, self.row, self.col = np.zeros(shape), np.zeros(shape[0]), np.zeros(shape[1])
        self.b1, self.b2, self.eps, self.t = b1, b2, eps, 0

    def __call__(self, a, b, G):
        """The direction of the weight, a tangent vector at a b."""
        self.t += 1
        g = projection(a, b, G)
        self.row = self.b2 * self.row + (1 - self.b2) * np.mean(g**2, axis=1)
        self.col = self.b2 * self.col + (1 - self.b2) * np.mean(g**2, axis=0)
        self.T = self.b1 * projection(a, b, self.T) + (1 - self.b1) * g
        row, col = (x / (1 - self.b2**self.t) + self.eps**2 for x in (self.row, self.col))
        T, v_hat = self.T / (1 - self.b1**self.t), np.outer(row, col) / np.mean(row)
        return projection(a, b, T / np.sqrt(v_hat))
