"""Look for the best policy of a space: trials in an Optuna study, proposals by a Gaussian process.

P ratios of a policy, n trials measured, S candidates.

Source: Hou and Kung, CVPR Workshops 2022 (a Gaussian process from policy to accuracy, expected improvement).
Differences from the published code, measured in docs/mdc.md: targets are standardised, inputs are the ratios that are
really cut, expected improvement is compared by its logarithm, and candidates are feasible draws and neighbours of the
best.

The study is the state. What is proposed next is a function of (seed, place of the trial, what the study holds), so a
search that was killed and goes on repeats the uninterrupted one, and any number of processes may share a study.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from scipy.special import erfcx, ndtr

from vitrim.errors import MethodError
from vitrim.search.gaussian import fitted
from vitrim.search.policy import Array, Space, mutate, sample

__all__ = [
    "Objective",
    "Proposal",
    "Trial",
    "best_of",
    "expected_improvement",
    "log_expected_improvement",
    "search",
    "trials_of",
]

Proposal = Literal["gp", "random"]
Objective = Callable[[Array], tuple[float, Mapping[str, Any]]]
"""Measures a policy ``(P,)``: the larger the better, and notes to keep with it."""

POOL, NEIGHBOURS, BEST = 2000, 500, 3
"""Candidates of one proposal: feasible draws, and neighbours of each of the best."""

PATIENCE = 60.0
"""Seconds without news, at the least, after which another process's trial is taken for lost."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One measured policy.

    Attributes:
        number: of the trial in its study.
        policy: ratios, ``(P,)``.
        value: what was measured; larger is better.
        notes: what the objective said of it.
    """

    number: int
    policy: Array
    value: float
    notes: Mapping[str, Any]


def expected_improvement(mean: Array, deviation: Array, best: float) -> Array:
    """``(mu - f) Phi(z) + sigma phi(z)``, ``z = (mu - f) / sigma``; ``max(mu - f, 0)`` where sigma is below 1e-9."""
    gain = mean - best
    z = gain / np.maximum(deviation, 1e-9)
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    found: Array = np.where(deviation < 1e-9, np.maximum(gain, 0), gain * ndtr(z) + deviation * density)
    return found


def log_expected_improvement(mean: Array, deviation: Array, best: float) -> Array:
    """The logarithm of `expected_improvement`, without underflow far below the best; -inf where it is 0."""
    gain = mean - best
    z = gain / np.maximum(deviation, 1e-9)
    with np.errstate(divide="ignore", invalid="ignore"):
        plain = np.log(np.maximum(expected_improvement(mean, deviation, best), 0))
        # phi(z) (1 - |z| R(z)), R the Mills ratio; beyond 1e4 the bracket is 1 / z^2 to the last digits.
        bracket = np.where(z < -1e4, z**-2.0, 1 + z * np.sqrt(np.pi / 2) * erfcx(-z / np.sqrt(2)))
        tail = np.log(deviation) - 0.5 * z**2 - 0.5 * np.log(2 * np.pi) + np.log(bracket)
    found: Array = np.where((z < -1) & (deviation >= 1e-9), tail, plain)
    return found


def search(
    study: optuna.Study,
    space: Space,
    objective: Objective,
    *,
    trials: int,
    initial: int,
    seed: int,
    proposal: Proposal = "gp",
    alone: bool = True,
    told: Callable[[Trial], None] = lambda _: None,
) -> None:
    """Measure policies until the study holds `trials` of them, together with every other process that shares it.

    Args:
        study: see `vitrim.search.study.open_study`.
        space: of the policies.
        objective: measures one.
        trials: to measure in all, by whomever.
        initial: of which so many are drawn, before the Gaussian process has a say.
        seed: of all draws.
        proposal: ``gp``, or ``random`` draws alone.
        alone: whether no other process works on the study. What is found unfinished was then left by one that was
            killed, and is measured again at once; otherwise only after nothing was heard for long.
        told: receives every trial that this process measured.

    Raises:
        BudgetError: if no policy is within the budget.
        MethodError: if hardly any policy is, so that none could be drawn.
    """
    study.sampler = _Sampler(space, trials, initial, seed, proposal)
    if alone:
        _drop(study, _of(study, TrialState.RUNNING))
    longest, heard, known = 0.0, time.monotonic(), 0
    while True:
        done, running = len(_of(study, TrialState.COMPLETE)), _of(study, TrialState.RUNNING)
        if done >= trials:
            return
        if done != known:
            heard, known = time.monotonic(), done
        if done + len(running) >= trials:
            if time.monotonic() - heard > max(PATIENCE, 10 * longest):
                _drop(study, running)
            time.sleep(0.2)
            continue
        start = time.monotonic()
        if not _step(study, space, objective, trials, told):
            return
        longest, heard = max(longest, time.monotonic() - start), time.monotonic()


def _step(study: optuna.Study, space: Space, objective: Objective, trials: int, told: Callable[[Trial], None]) -> bool:
    """Ask, measure, tell; whether there was a policy left to measure."""
    trial = study.ask()
    if not trial.relative_params:
        study.tell(trial, state=TrialState.FAIL)
        return _place(study.get_trials(deepcopy=False), trial.number) >= trials
    policy = np.array(
        [trial.suggest_float(name, 0, float(high)) for name, high in zip(space.names, space.upper, strict=True)]
    )
    try:
        value, notes = objective(policy)
    except BaseException:
        study.tell(trial, state=TrialState.FAIL)
        raise
    for name, note in notes.items():
        trial.set_user_attr(name, note)
    # Another process may have given this trial up meanwhile; then its policy is, or will be, measured there.
    told_state = study.tell(trial, value, skip_if_finished=True).state
    if told_state == TrialState.COMPLETE:
        told(Trial(number=trial.number, policy=policy, value=value, notes=notes))
    return True


def trials_of(study: optuna.Study, space: Space) -> list[Trial]:
    """Every trial that was measured, in order."""
    return [
        Trial(
            number=trial.number,
            policy=np.array([trial.params[name] for name in space.names]),
            value=float(trial.values[0]),
            notes=dict(trial.user_attrs),
        )
        for trial in _of(study, TrialState.COMPLETE)
    ]


def best_of(trials: Sequence[Trial]) -> Trial:
    """The best measured (not the best predicted); of equal ones the first.

    Raises:
        MethodError: if there is none.
    """
    if not trials:
        raise MethodError("a search must have measured a policy, but its study holds none; ask for more trials")
    return max(trials, key=lambda trial: (trial.value, -trial.number))


def _of(study: optuna.Study, state: TrialState) -> list[FrozenTrial]:
    found = study.get_trials(deepcopy=False, states=(state,))
    return sorted(found, key=lambda trial: trial.number)


def _drop(study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
    """Mark trials as failed, so that their places are taken again."""
    for trial in trials:
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _place(trials: Sequence[FrozenTrial], number: int) -> int:
    """Trials before this one that count."""
    return sum(trial.number < number and trial.state != TrialState.FAIL for trial in trials)


class _Sampler(optuna.samplers.BaseSampler):
    """What a study asks for the next policy; it gives none where enough were given, or no new one can be found."""

    def __init__(self, space: Space, trials: int, initial: int, seed: int, proposal: Proposal) -> None:
        self.space, self.trials, self.initial, self.seed, self.proposal = space, trials, initial, seed, proposal

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Every ratio."""
        return {
            name: FloatDistribution(0, float(high))
            for name, high in zip(self.space.names, self.space.upper, strict=True)
        }

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next policy."""
        known = study.get_trials(deepcopy=False)
        place = _place(known, trial.number)
        if place >= self.trials:
            return {}
        rng = np.random.default_rng([self.seed, place])
        policy = self._next(known, place, rng)
        return {} if policy is None else {n: float(r) for n, r in zip(self.space.names, policy, strict=True)}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never needed: every ratio is proposed together."""
        raise MethodError(f"{param_name}: a ratio must be of the study's space, but is not; open another study")

    def _next(self, known: Sequence[FrozenTrial], place: int, rng: np.random.Generator) -> Array | None:
        space = self.space
        done = sorted((t for t in known if t.state == TrialState.COMPLETE), key=lambda t: t.number)
        busy = [t for t in known if t.state == TrialState.RUNNING and len(t.params) == len(space.names)]
        policies, running = (
            np.array([[t.params[name] for name in space.names] for t in some]).reshape(len(some), len(space.names))
            for some in (done, busy)
        )
        taken = {_key(row) for row in space.realised(np.concatenate([policies, running]))}
        guided = self.proposal == "gp" and place >= self.initial and len(done) >= 2
        values = np.array([t.values[0] for t in done])
        pool = self._pool(policies, values, rng) if guided else sample(space, 16 + len(taken), rng)
        pool = _new(space, pool, taken)
        if not len(pool):
            pool = _new(space, sample(space, POOL, rng), taken)
        if not len(pool):
            if not taken:
                raise MethodError(
                    f"policies must spend at least {1 - space.band:.0%} of the budget, but none drawn does; ask for "
                    "another budget, or raise the bounds"
                )
            return None
        if not guided:
            return np.asarray(pool[0])
        return np.asarray(pool[_choose(space, policies, values, running, pool)])

    def _pool(self, policies: Array, values: Array, rng: np.random.Generator) -> Array:
        best = np.argsort(-values, kind="stable")[:BEST]
        near = [mutate(self.space, policies[i], NEIGHBOURS, rng) for i in best]
        return np.concatenate([sample(self.space, POOL, rng), *near])


def _choose(space: Space, policies: Array, values: Array, running: Array, pool: Array) -> int:
    """The candidate with the largest expected improvement."""
    inside, pending, candidates = (space.realised(some) / space.upper for some in (policies, running, pool))
    scale = float(values.std()) or 1.0
    targets = (values - values.mean()) / scale
    mean, deviation = fitted(inside, targets, pending)(candidates)
    return int(np.argmax(log_expected_improvement(mean, deviation, float(targets.max()))))


def _key(realised: Array) -> bytes:
    return np.round(realised, 9).tobytes()


def _new(space: Space, policies: Array, taken: set[bytes]) -> Array:
    """Those whose architecture was not measured yet."""
    fresh: NDArray[np.bool_] = np.array([_key(row) not in taken for row in space.realised(policies)], dtype=bool)
    return policies[fresh] if len(policies) else policies
