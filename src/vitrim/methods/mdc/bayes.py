"""Search a space for the best policy: trials in an Optuna study, proposals by Optuna's Gaussian process.

P ratios of a policy, S policies side by side.

Source: Hou and Kung, CVPR Workshops 2022 (a Gaussian process from policy to accuracy, expected improvement). The
process and its log expected improvement are Optuna's (`optuna.samplers.GPSampler`). The sampler does not use the
budget: each point it proposes is scaled into the budget (`within`), and the process is fitted to points and values. A
BoTorch process over a pool of feasible policies, as in the paper, was measured for comparison. It found slightly worse
policies and needs two more packages (docs/methods/mdc.md).

The study is the only state. The next proposal is a function of (seed, position of the trial, contents of the study). So
a search that was killed and resumed repeats the uninterrupted one, and any number of processes may share a study.
"""

import contextlib
import dataclasses
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from vitrim.cut.spend import Policies, Space, project, within
from vitrim.methods.mdc.owners import own, without_owner
from vitrim.methods.mdc.policy import mutate, sample
from vitrim.words.chain import behind
from vitrim.words.errors import MethodError

__all__ = ["Objective", "Proposal", "Trial", "best_of", "drop_unfinished", "search", "trials_of"]

Proposal = Literal["gp", "random"]
Objective = Callable[[Policies], tuple[float, Mapping[str, Any]]]
"""A function from a policy ``(P,)`` to its value (larger is better) and notes to store with it."""

_MEASURED = (TrialState.COMPLETE, TrialState.RUNNING)
_DRAWN, _MORE, _NEAR = 16, 2000, 64
PATIENCE = 60.0
"""Seconds without a sign of life after which another process's trial counts as lost.

Relational storages keep heartbeats of every running trial. In the others, and for a process that died before its first
beat, a sign of life is a finished trial of any process, and the patience is at least ten times the longest trial.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One measured policy.

    Attributes:
        number: number of the trial in its study.
        policy: ratios, ``(P,)``.
        value: the measured value; larger is better.
        notes: notes of the objective.
    """

    number: int
    policy: Policies
    value: float
    notes: Mapping[str, Any]


def search(
    study: optuna.Study,
    space: Space,
    objective: Objective,
    *,
    trials: int,
    initial: int,
    seed: int,
    proposal: Proposal = "gp",
    first: Policies | None = None,
    alone: bool = True,
    told: Callable[[Trial], None] = lambda _: None,
) -> None:
    """Measure policies until the study contains `trials` of them, together with all processes that share it.

    Args:
        study: see `vitrim.methods.mdc.study.open_study`.
        space: the space of policies.
        objective: a function that measures a policy.
        trials: total number to measure, over all processes.
        initial: number of these that are drawn before the Gaussian process proposes.
        seed: seed of all draws.
        proposal: ``gp``, or ``random`` for only random draws.
        first: policies to measure before any is drawn, ``(F, P)``; they count toward `initial`. Policies that do not
            fit the budget at any scale, or whose architecture was already measured, are left out.
        alone: whether no other process works on the study. Unfinished trials were then left by a killed process, and
            are measured again at once; otherwise those whose process has ended on this machine, and others only after
            `PATIENCE` without a sign of life. A process whose trial was taken over by mistake loses the value and goes
            on.
        told: called with every trial that this process measured.

    Raises:
        BudgetError: if no policy is within the budget.
        MethodError: if so few policies are within the budget that none could be drawn, or a value is not a number.
    """
    study.sampler = _Sampler(space, trials, initial, seed, proposal, first)
    if alone:
        drop_unfinished(study)
    else:
        _drop(study, without_owner(study, _of(study, TrialState.RUNNING)))
    longest, heard, known = 0.0, time.monotonic(), 0
    while True:
        done, running = len(_of(study, TrialState.COMPLETE)), _of(study, TrialState.RUNNING)
        if done >= trials:
            return
        if done != known:
            heard, known = time.monotonic(), done
        if done + len(running) >= trials:
            _drop_stale(study)
            _drop(study, without_owner(study, running))
            if time.monotonic() - heard > max(PATIENCE, 10 * longest):
                _drop(study, running)
            time.sleep(0.2)
            continue
        start = time.monotonic()
        if not _step(study, space, objective, trials, told):
            return
        longest, heard = max(longest, time.monotonic() - start), time.monotonic()


def _step(study: optuna.Study, space: Space, objective: Objective, trials: int, told: Callable[[Trial], None]) -> bool:
    """Run one trial: get a policy, measure it and store the value; return False if there is none left to measure."""
    turn = _Turn(space, objective)
    try:
        with _heart_quiet():
            study.optimize(turn, n_trials=1, catch=(_NothingLeft,))
    except BaseException as problem:
        if turn.problem is not None:
            raise turn.problem from None
        failed = _of_storage(problem)
        if failed is not None and failed is not problem:
            # Where a trial cannot be told, Optuna ends with an assertion of its own that "should not be reached".
            raise failed from failed.__cause__
        if not turn.lost(problem):
            if not isinstance(problem, Exception) and turn.number is not None:
                study.tell(turn.number, state=TrialState.FAIL, skip_if_finished=True)
            raise
        # Another process took this one for dead and ended its trial, so that its position is used again. The value is
        # lost, and the search goes on.
        return True
    assert turn.number is not None
    if turn.trial is None:
        return _place(study.get_trials(deepcopy=False), turn.number) >= trials
    told(turn.trial)
    return True


@contextlib.contextmanager
def _heart_quiet() -> Iterator[None]:
    """Let the thread that beats for a trial end silently where the storage fails; the search meets the same error."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is None or _of_storage(arguments.exc_value) is None:
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _of_storage(problem: BaseException) -> Exception | None:
    """Return the error of the storage that an error is or was raised after; None if there was none."""
    kinds = optuna.exceptions.StorageInternalError | SQLAlchemyError
    return next((each for each in behind(problem) if isinstance(each, kinds)), None)


class _NothingLeft(Exception):
    """The sampler has no policy to give."""


class _Turn:
    """One trial of this process. Optuna runs it, and beats for it while it runs (see `vitrim.methods.mdc.study`).

    Attributes:
        number: number of the trial; None before Optuna has given one.
        trial: what was measured; None if there was nothing to measure.
        problem: the exception of the objective, if it raised one.
    """

    def __init__(self, space: Space, objective: Objective) -> None:
        self.space, self.objective = space, objective
        self.number: int | None = None
        self.trial: Trial | None = None
        self.problem: Exception | None = None

    def __call__(self, trial: optuna.Trial) -> float:
        """Return the value of the policy that the sampler gave to `trial`."""
        self.number = trial.number
        if not trial.relative_params:
            raise _NothingLeft
        pairs = zip(self.space.names, self.space.upper, strict=True)
        point = np.array([trial.suggest_float(name, 0, float(high)) for name, high in pairs])
        policy = within(self.space, point[None])[0]
        try:
            if np.isnan(policy).any():
                raise MethodError("a policy put into the study must fit the budget, but no factor brings it in")
            value, notes = self.objective(policy)
            if math.isnan(value):
                raise MethodError("what a policy is measured by must be a number, but is not; check weights and images")
        except Exception as problem:
            self.problem = problem
            raise
        for name, note in notes.items():
            trial.set_user_attr(name, note)
        self.trial = Trial(number=trial.number, policy=policy, value=value, notes=notes)
        return value

    def lost(self, problem: BaseException) -> bool:
        """Return whether Optuna raised `problem` because another process has ended the trial.

        The sampler, a ratio and a note may meet that first (`UpdateFinishedTrialError`); when the trial is told in the
        end, Optuna raises a plain ``ValueError``.
        """
        updated = isinstance(problem, optuna.exceptions.UpdateFinishedTrialError)
        return updated or (type(problem) is ValueError and self.number is not None)


def trials_of(study: optuna.Study, space: Space) -> list[Trial]:
    """Return every measured trial, in order."""
    done = _of(study, TrialState.COMPLETE)
    return [
        Trial(number=trial.number, policy=policy, value=float(trial.values[0]), notes=dict(trial.user_attrs))
        for trial, policy in zip(done, within(space, _points(done, space)), strict=True)
    ]


def best_of(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the best measured value (not the best predicted one); the first if several are equal.

    Raises:
        MethodError: if there is no measured trial.
    """
    if not trials:
        raise MethodError("a search must have measured a policy, but its study holds none; ask for more trials")
    return max(trials, key=lambda trial: (trial.value, -trial.number))


def _of(study: optuna.Study, state: TrialState) -> list[FrozenTrial]:
    found = study.get_trials(deepcopy=False, states=(state,))
    return sorted(found, key=lambda trial: trial.number)


def drop_unfinished(study: optuna.Study) -> None:
    """Mark the trials that a killed process left as failed, before any process works on the study."""
    _drop(study, _of(study, TrialState.RUNNING))


def _drop(study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
    """Mark trials as failed, so that their positions are used again."""
    for trial in trials:
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _drop_stale(study: optuna.Study) -> None:
    """Mark trials as failed whose process has not beaten for them, where the storage keeps heartbeats."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)


def _place(trials: Sequence[FrozenTrial], number: int) -> int:
    """Return the number of trials before this one that count."""
    return sum(trial.number < number and trial.state != TrialState.FAIL for trial in trials)


class _Sampler(optuna.samplers.BaseSampler):
    """The sampler of the study; it gives no policy if enough were given, or no new one can be found."""

    def __init__(
        self, space: Space, trials: int, initial: int, seed: int, proposal: Proposal, first: Policies | None
    ) -> None:
        self.space, self.trials, self.initial, self.seed, self.proposal = space, trials, initial, seed, proposal
        self.first = np.empty((0, len(space.names))) if first is None else project(space, first)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Store whose trial this is."""
        own(study, trial.number)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Every ratio."""
        return {
            name: FloatDistribution(0, float(high))
            for name, high in zip(self.space.names, self.space.upper, strict=True)
        }

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the next policy."""
        known = study.get_trials(deepcopy=False)
        place = _place(known, trial.number)
        if place >= self.trials:
            return {}
        point = self._next(study, trial, known, place)
        return {} if point is None else {n: float(r) for n, r in zip(self.space.names, point, strict=True)}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Raise an error: all ratios are proposed together, so this is called only for a wrong study."""
        raise MethodError(f"{param_name}: a ratio must be of the study's space, but is not; open another study")

    def _next(
        self, study: optuna.Study, trial: FrozenTrial, known: Sequence[FrozenTrial], place: int
    ) -> Policies | None:
        space, rng = self.space, np.random.default_rng([self.seed, place])
        counted = [t for t in known if t.state in _MEASURED and len(t.params) == len(space.names)]
        policies = within(space, _points(counted, space))
        taken = {_bits(row) for row in space.realised(policies[~np.isnan(policies).any(axis=1)])}
        if place < len(self.first) and len(fresh := _new(space, self.first[place : place + 1], taken)):
            return np.asarray(fresh[0])
        done = sum(t.state == TrialState.COMPLETE for t in known)
        if self.proposal == "gp" and place >= self.initial and done >= 2:
            point = self._guided(study, trial, rng)
            policy = within(space, point[None])
            if not np.isnan(policy).any():
                if _bits(space.realised(policy)[0]) not in taken:
                    return point
                near = _new(space, mutate(space, policy[0], _NEAR, rng), taken)
                if len(near):
                    return np.asarray(near[0])
        pool = _new(space, sample(space, _DRAWN + len(taken), rng), taken)
        if not len(pool):
            pool = _new(space, sample(space, _MORE, rng), taken)
        if not len(pool) and not taken:
            raise MethodError(
                f"policies must spend at least {1 - space.band:.0%} of the budget, but none drawn does; ask for "
                "another budget, or raise the bounds"
            )
        return np.asarray(pool[0]) if len(pool) else None

    def _guided(self, study: optuna.Study, trial: FrozenTrial, rng: np.random.Generator) -> Policies:
        """Return the proposal of Optuna's sampler; the sampler is new each time, so the study is the only state."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about experimental features, and fits that stop early
            inner = optuna.samplers.GPSampler(seed=int(rng.integers(2**31)), n_startup_trials=0)
            found = inner.sample_relative(study, trial, self.infer_relative_search_space(study, trial))
        return np.array([found[name] for name in self.space.names])


def _points(trials: Sequence[FrozenTrial], space: Space) -> Policies:
    rows = [[trial.params[name] for name in space.names] for trial in trials]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(space.names))


def _bits(realised: Policies) -> bytes:
    return np.round(realised, 9).tobytes()


def _new(space: Space, policies: Policies, taken: set[bytes]) -> Policies:
    """Return the policies whose architecture was not measured yet."""
    fresh: NDArray[np.bool_] = np.array([_bits(row) not in taken for row in space.realised(policies)], dtype=bool)
    return policies[fresh] if len(policies) else policies
