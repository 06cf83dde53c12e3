"""Policies that spend a budget, and the search among them: what is drawn, proposed, stored and refused."""

import concurrent.futures
import contextlib
import functools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import warnings

import numpy as np
import optuna
import pytest
import timm
import torch

from tests.conftest import HANGS
from tests.samples import PRESETS, adopted
from tests.test_progress import until
from vitrim import cli, families
from vitrim.cut.spend import Space, project, scaled
from vitrim.families import describe
from vitrim.methods.mdc import bayes
from vitrim.methods.mdc import study as studies
from vitrim.methods.mdc.decode import PRESETS as PUBLISHED
from vitrim.methods.mdc.decode import Bounds, Frame, natural, released_macs, selection_blocks, token_counts
from vitrim.methods.mdc.owners import own, without_owner
from vitrim.methods.mdc.policy import mutate, sample
from vitrim.methods.mdc.share import Chooser
from vitrim.methods.mdc.study import open_study
from vitrim.words.budget import Budget
from vitrim.words.costs import cost_of
from vitrim.words.errors import BudgetError, MethodError, RunError
from vitrim.words.spec import why_not_mixed

HALF = Bounds(heads=0.5, neurons=0.5, tokens=0.5)

MEASURES_UNTIL_KILLED = """
import os, signal, sys
from tests.test_mdc_search import TestSearch, open_study, peak

url, when, measured = sys.argv[1], int(sys.argv[2]), []

def stopping(policy):
    if len(measured) == when:
        os.kill(os.getpid(), signal.SIGKILL)
    measured.append(policy)
    return peak(policy)

TestSearch().run(open_study(url, "s", {}), objective=stopping, alone=False)
"""


@functools.cache
def deit(size):
    with torch.device("meta"):
        return describe(timm.create_model(f"deit_{size}_patch16_224"))


def frame(size="small", budget="macs=0.6", **options):
    spec = deit(size)
    return Frame(spec, natural(spec), Budget.parse(budget), HALF, **options)


def few(trials=3):
    """A small space whose policies cost their mean."""
    return Space(
        names=("a", "b", "c"),
        upper=np.full(3, 0.5),
        spent=lambda x: (1 - x.mean(axis=1)) / 0.7,
        realised=lambda x: np.round(x, 2),
    )


def begun(study):
    """Begin a trial that nobody measures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna beats only where it runs the trial itself
        return study.ask()


def peak(policy):
    return float(-np.square(policy - [0.5, 0.1, 0.3]).sum()), {"cost": 1}


class TestPolicies:
    @pytest.mark.parametrize("size", ["tiny", "small", "base"])
    @pytest.mark.parametrize("keep", [0.9, 0.6, 0.3])
    def test_a_thousand_policies_spend_their_budget(self, size, keep):
        space = frame(size, f"macs={keep}").space
        found = sample(space, 1000, np.random.default_rng(0))
        spent = space.spent(found)
        assert len(found) == 1000
        assert float(spent.max()) <= 1
        assert float(spent.min()) >= 0.98
        assert float(found.min()) >= 0
        assert float(found.max()) <= 0.5

    def test_out_of_reach_is_said_at_once(self):
        with pytest.raises(BudgetError, match=r"must be at least 1,1\d\d,\d\d\d,\d\d\d for this model"):
            frame(budget="macs=0.2")
        with pytest.raises(BudgetError, match=r"at least 1\.25 times"):
            sample(Space(names=("a",), upper=np.array([0.5]), spent=lambda x: 1.25 + 0 * x[:, 0], realised=lambda x: x),
                   1, np.random.default_rng(0))  # fmt: skip

    @pytest.mark.parametrize(("family", "preset"), PRESETS)
    def test_costs_are_those_of_the_plans(self, family, preset):
        """The arithmetic of the search and that of the report are one, on every preset and at random policies."""
        model = adopted(family, preset)
        spec = describe(model)
        tokens = 0.5 if why_not_mixed(spec.stages[0]) is None else 0.0
        made = Frame(
            spec, natural(spec), Budget.parse("macs=1,params=1"), Bounds(heads=0.9, neurons=0.9, tokens=tokens)
        )
        drawn = np.random.default_rng(0).random((6, len(made.space.names))) * made.space.upper
        costs = made.costs(drawn)
        for i, policy in enumerate(drawn):
            cost = cost_of(Chooser(made).plan(policy).child(spec))
            assert cost == (costs.macs[i], costs.params[i])

    def test_cost_falls_with_every_ratio(self):
        space = frame().space
        rng = np.random.default_rng(0)
        for _ in range(20):
            a = rng.random((1, 25)) * 0.5
            b = np.minimum(a + rng.random((1, 25)) * 0.2 * (rng.random((1, 25)) < 0.3), 0.5)
            assert space.spent(b)[0] <= space.spent(a)[0]

    def test_neighbours_and_projections_are_feasible(self):
        space, rng = frame().space, np.random.default_rng(0)
        best = sample(space, 1, rng)[0]
        near = mutate(space, best, 200, rng)
        assert len(near) > 150
        assert space.feasible(near).all()
        assert np.abs(near - best).mean() < np.abs(sample(space, 200, rng) - best).mean()
        assert space.feasible(project(space, rng.random((50, 25)) / 2)).all()

    def test_even(self):
        found = frame()
        policy = scaled(found.space, found.space.upper)
        assert found.space.feasible(policy[None]).all()
        assert float(np.median(policy)) == pytest.approx(float(policy.max()), abs=0.02)

    def test_where_selections_stand(self):
        assert [selection_blocks(n) for n in (12, 14, 19, 24)] == [(3, 6, 9), (3, 7, 10), (4, 9, 14), (6, 12, 18)]

    def test_token_counts(self):
        assert [int(left) for _, left in token_counts(197, 0.48807, 3, 2)] == [101, 52, 27]
        assert [int(left) for _, left in token_counts(197, 0.40072, 3, 2)] == [119, 72, 44]
        assert [int(left) for _, left in token_counts(197, 0.0, 3, 2)] == [197] * 3
        assert [int(left) for _, left in token_counts(5, 0.9, 3, 3)] == [4, 4, 4]


class TestPublished:
    @pytest.mark.parametrize(
        ("size", "heads", "released", "exact", "params"),
        [
            ("tiny", None, 1.224590, 1.253683, 5_717_416),
            ("small", None, 4.540696, 4.598882, 22_050_664),
            ("base", None, 17.447455, 17.563828, 86_567_656),
            ("small", "deit_small_60", 1.862783, 1.933382, 17_831_034),
            ("base", "deit_base_60", 6.938087, 7.142908, 67_252_883),
        ],
    )
    def test_costs(self, size, heads, released, exact, params):
        made = frame(size, "macs=0.5", rounding="floor")
        spec, width = made.spec, made.spec.stages[0].width
        policy = np.zeros(25) if heads is None else made.policy(PUBLISHED[heads])
        child = Chooser(made).plan(policy).child(spec)
        cost = cost_of(child)
        assert cost.macs / 1e9 == pytest.approx(exact, abs=1e-6)
        assert cost.params == params
        kept = [(len(block.mixer.v), block.hidden) for _, _, block in child.blocks()]
        theirs = released_macs(*zip(*kept, strict=True), policy[-1], width=width, channels=64)
        assert theirs / 1e9 == pytest.approx(released, abs=1e-6)
        if heads is not None:
            assert tuple(k for k, _ in kept) == PUBLISHED[heads].heads
            assert tuple(m for _, m in kept) == PUBLISHED[heads].neurons

    @pytest.mark.parametrize(("ratio", "macs"), [(0.1, 3.988), (0.3, 2.980), (0.4, 2.608), (0.5, 2.282)])
    def test_tokens_alone(self, ratio, macs):
        """Exact cost of DeiT-S with tokens alone."""
        policy = np.zeros((1, 25))
        policy[0, -1] = ratio
        assert frame().costs(policy).macs[0] / 1e9 == pytest.approx(macs, abs=5e-4)

    def test_another_model_is_refused(self):
        spec = describe(adopted("vit", "plain"))
        made = Frame(spec, natural(spec), Budget.parse("macs=0.7"), HALF)
        with pytest.raises(MethodError, match="must be of the model's 12 blocks"):
            made.policy(PUBLISHED["deit_small_60"])


class TestSearch:
    def run(self, study, space=None, objective=peak, trials=9, seed=0, **options):
        space = space or few()
        bayes.search(study, space, objective, trials=trials, initial=5, seed=seed, **options)
        return bayes.trials_of(study, space)

    def memory(self):
        return optuna.create_study(direction="maximize")

    def test_same_seed_same_trials(self):
        first, again, other = (self.run(self.memory(), seed=seed) for seed in (0, 0, 1))
        assert [t.policy.tolist() for t in first] == [t.policy.tolist() for t in again]
        assert [t.policy.tolist() for t in first] != [t.policy.tolist() for t in other]

    def test_it_is_feasible_distinct_and_the_best_measured(self):
        space, trials = few(), self.run(self.memory())
        policies = np.array([t.policy for t in trials])
        assert space.feasible(policies).all()
        assert len({row.tobytes() for row in space.realised(policies)}) == len(trials) == 9
        best = bayes.best_of(trials)
        assert best.value == max(t.value for t in trials) == peak(best.policy)[0]

    def test_corners_come_first(self, tmp_path):
        made = frame(budget="macs=0.7")
        corners = made.corners()
        kinds = np.array([name.rsplit(".", 1)[-1] for name in made.space.names])
        for corner, kind in zip(corners, ("heads", "hidden", "tokens"), strict=True):
            assert (corner[kinds == kind] == 0.5).all()
            assert not corner[kinds != kind].any()
        inside = project(made.space, corners)
        assert len(inside) == 3
        assert (inside[0][kinds == "heads"] == 0.5).all()
        assert 0.01 < inside[0][kinds == "hidden"].mean() < 0.2, "heads alone leave more than 0.7"
        assert inside[1][kinds == "hidden"].min() > 0.3
        assert inside[1][kinds != "hidden"].max() < 1e-4
        assert inside[2][kinds != "tokens"].max() < 1e-4

        def run(study, objective=lambda policy: (-float(policy.sum()), {}), first=corners):
            return self.run(study, made.space, objective, trials=7, first=first)

        whole = run(self.memory())
        assert [t.policy.tolist() for t in whole[:3]] == inside.tolist()
        assert len({made.space.realised(t.policy[None]).tobytes() for t in whole}) == 7
        # Draws go on where they would have been.
        drawn = run(self.memory(), first=None)
        assert [t.policy.tolist() for t in whole[3:5]] == [t.policy.tolist() for t in drawn[3:5]]

        url, calls = f"sqlite:///{tmp_path / 'trials.db'}", []

        def dying(policy):
            calls.append(policy)
            if len(calls) == 2:
                raise SystemExit
            return -float(policy.sum()), {}

        with pytest.raises(SystemExit):
            run(open_study(url, "s", {}), dying)
        resumed = run(open_study(url, "s", {}))
        assert [t.policy.tolist() for t in resumed] == [t.policy.tolist() for t in whole]

    def test_a_killed_search_goes_on_as_if_it_had_not_been(self, tmp_path):
        whole = self.run(self.memory())
        url = f"sqlite:///{tmp_path / 'trials.db'}"

        def dying(policy):
            if len(optuna.load_study(study_name="s", storage=url).trials) == 7:
                raise SystemExit
            return peak(policy)

        with pytest.raises(SystemExit):
            self.run(open_study(url, "s", {}), objective=dying)
        # A trial that a process took along when it died has no end.
        begun(open_study(url, "s", {}))
        resumed = self.run(open_study(url, "s", {}))
        assert [t.policy.tolist() for t in resumed] == [t.policy.tolist() for t in whole]
        assert self.run(open_study(url, "s", {})) is not None
        assert len(bayes.trials_of(open_study(url, "s", {}), few())) == 9

    @pytest.mark.parametrize("storage", ["sqlite:///{}/trials.db", "journal://{}/trials.log"])
    def test_a_worker_whose_trial_was_taken_over_goes_on(self, storage, tmp_path):
        """Another process ends the trial while it is measured, or before its first ratio is stored."""
        study, ended = open_study(storage.format(tmp_path), "s", {}), []

        def taken(policy):
            if len(study.trials) in (2, 4) and len(ended) < len(study.trials) // 2:
                ended.append(study.trials[-1].number)
                study.tell(ended[-1], state=optuna.trial.TrialState.FAIL)
            return peak(policy)

        told = []
        trials = self.run(study, objective=taken, told=told.append)
        assert ended == [1, 3]
        assert len(trials) == len(told) == 9
        assert not {trial.number for trial in trials} & set(ended)
        assert len({few().realised(t.policy[None]).tobytes() for t in trials}) == 9

    def test_a_trial_that_is_lost_while_it_is_proposed(self, tmp_path, monkeypatch):
        """Optuna then raises as soon as the worker stores what the sampler gave."""
        study = open_study(f"sqlite:///{tmp_path / 'trials.db'}", "s", {})
        real, ended = bayes._Sampler.sample_relative, []

        def slow(self, study, trial, space):
            if trial.number == 2:
                ended.append(study.tell(trial.number, state=optuna.trial.TrialState.FAIL))
            return real(self, study, trial, space)

        monkeypatch.setattr(bayes._Sampler, "sample_relative", slow)
        assert len(self.run(study, objective=peak)) == 9
        assert len(ended) == 1

    def test_a_dead_worker_is_known_by_its_heart(self, tmp_path, monkeypatch):
        """One that beats is waited for, whatever its trial takes; the trial of one that does not is measured again.

        No beat must come within seconds here: a busy machine delays them. Hearts are set back by an hour instead.
        """
        monkeypatch.setattr(studies, "_BEATS", 60)  # of the patience of a minute: one a second
        url = f"sqlite:///{tmp_path / 'trials.db'}"
        study, other = open_study(url, "s", {}), open_study(url, "s", {})
        dead = begun(study)._trial_id
        study.set_user_attr("owner elsewhere 0 pid:[1] 1 12.00 1", 0)
        study._storage.record_heartbeat(dead)
        measuring = threading.Event()

        def asked(query, *values):
            with contextlib.closing(sqlite3.connect(tmp_path / "trials.db", timeout=60)) as base, base:
                return base.execute(query, values).fetchone()[0]

        def set_back(trial):
            change = "update trial_heartbeats set heartbeat = datetime(heartbeat, '-1 hour') where trial_id = ?"
            return asked(f"{change} returning heartbeat", trial)

        def slow(policy):
            if measuring.is_set():
                return peak(policy)
            mine = other.trials[-1]._trial_id
            until(lambda: asked("select count(*) from trial_heartbeats where trial_id = ?", mine), seconds=600)
            before = set_back(mine)
            until(
                lambda: asked("select heartbeat from trial_heartbeats where trial_id = ?", mine) > before, seconds=600
            )
            measuring.set()
            until(lambda: study.trials[0].state.name == "FAIL", seconds=600)
            return peak(policy)

        with concurrent.futures.ThreadPoolExecutor() as pool:
            theirs = pool.submit(self.run, other, objective=slow, trials=2, alone=False)
            assert measuring.wait(600)
            set_back(dead)
            ours = self.run(study, trials=2, alone=False)
            assert [t.number for t in theirs.result()] == [t.number for t in ours]
        # Where both begin the second trial in the same moment, one of the two gets no policy, and ends so.
        states = [trial.state.name for trial in study.trials if trial.number == 0 or trial.params]
        assert states == ["FAIL", "COMPLETE", "COMPLETE"], "only the dead one was given up"

    @pytest.mark.parametrize("when", [0, 5])
    def test_a_killed_process_of_this_machine_is_known_at_once(self, when, tmp_path):
        """The trial of a killed process is measured again before any other, so the search ends as if left alone."""
        url = f"sqlite:///{tmp_path / 'trials.db'}"
        whole = self.run(self.memory())
        # A new process: a fork starts with the locks and threads of whatever ran before, and sometimes failed.
        done = subprocess.run(
            [sys.executable, "-c", MEASURES_UNTIL_KILLED, url, str(when)], capture_output=True, text=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        study = open_study(url, "s", {})
        assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * when + ["RUNNING"]
        went_on = self.run(study, alone=False)
        assert [trial.policy.tolist() for trial in went_on] == [trial.policy.tolist() for trial in whole]

    def test_a_trial_of_another_machine_is_left_to_its_heart(self, tmp_path):
        study = open_study(f"sqlite:///{tmp_path / 'trials.db'}", "s", {})
        trials = [begun(study) for _ in range(3)]
        study.set_user_attr("owner elsewhere 0 pid:[1] 1 12.00 1", trials[0].number)
        own(study, trials[1].number)
        assert [t.number for t in without_owner(study, study.trials)] == [2], (
            "of this no process says that it is its own"
        )
        assert not without_owner(study, study.trials[:2])

    def test_a_storage_that_cannot_be_written_is_the_error(self, tmp_path, monkeypatch):
        """Optuna ends with an assertion of its own where a trial cannot be told."""
        study = open_study(f"sqlite:///{tmp_path / 'trials.db'}", "s", {})

        def locked(*_, **__):
            raise optuna.exceptions.StorageInternalError("attempt to write a readonly database")

        monkeypatch.setattr(study._storage, "set_trial_state_values", locked)
        with pytest.raises(optuna.exceptions.StorageInternalError, match="readonly"):
            self.run(study, alone=False)

    def test_a_flat_objective(self):
        trials = self.run(self.memory(), objective=lambda _: (1.0, {}))
        assert len({few().realised(t.policy[None]).tobytes() for t in trials}) == 9

    def test_a_small_space_is_searched_out(self):
        space = Space(names=("a",), upper=np.array([0.5]), spent=lambda x: 0 * x[:, 0] + 1,
                      realised=lambda x: np.round(4 * x) / 4)  # fmt: skip
        trials = self.run(self.memory(), space, lambda p: (float(p[0]), {}), trials=50)
        assert len(trials) == 3
        assert bayes.best_of(trials).policy[0] > 0.37

    def test_no_policy_at_all(self):
        gap = Space(names=("a",), upper=np.array([0.5]), spent=lambda x: np.where(x[:, 0] > 0.2, 0.5, 1.5),
                    realised=lambda x: x)  # fmt: skip
        with pytest.raises(MethodError, match="policies must spend at least 98%"):
            self.run(self.memory(), gap)

    def test_not_a_number_is_said_and_loses_nothing(self):
        study = self.memory()
        self.run(study, trials=4)
        with pytest.raises(MethodError, match="must be a number"):
            self.run(study, objective=lambda _: (float("nan"), {}))
        assert len(self.run(study)) == 9

    def test_it_beats_chance_on_the_synthetic_objective(self):
        """A taste of benchmarks/mdc_search.py, which has ten seeds and four budgets."""
        from benchmarks.mdc_search import SEARCHES, hills

        space = frame().space
        value = hills(space, 0)
        guided, drawn = (SEARCHES[name](space, value, 0, 16, 8)[0] for name in ("optuna", "random"))
        assert value(guided) > value(drawn)


class TestStorage:
    def test_another_model_or_space_is_refused(self, tmp_path):
        url = f"sqlite:///{tmp_path / 'trials.db'}"
        open_study(url, "mdc", {"model": "a", "space": "x"})
        open_study(url, "mdc", {"model": "a", "space": "x"})
        for name, identity in (("model", {"model": "b", "space": "x"}), ("space", {"model": "a", "space": "y"})):
            with pytest.raises(RunError, match=f"study mdc must be of the same {name}"):
                open_study(url, "mdc", identity)
        assert open_study(url, "other", {"model": "b"}).user_attrs == {"model": "b"}

    @pytest.mark.parametrize(
        "url",
        [
            "nonsense",
            "nothing://here",
            "sqlite:////no/such/folder/trials.db",
            "redis://localhost",
            "mysql://x:secret@127.0.0.1:1/y",
        ],
    )
    def test_unreachable(self, url):
        with pytest.raises(RunError, match="storage must be reachable and free") as told:
            open_study(url, "mdc", {})
        assert "secret" not in str(told.value)

    def test_locked(self, tmp_path, monkeypatch):
        monkeypatch.setattr("vitrim.methods.mdc.study._LOCKED", 0.1)
        path = tmp_path / "trials.db"
        url = f"sqlite:///{path}"
        study = open_study(url, "mdc", {})
        TestSearch().run(study, trials=3)
        holder = sqlite3.connect(path)
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(RunError, match="locked"):
            open_study(url, "mdc", {"model": "a"})
        holder.rollback()
        assert len(bayes.trials_of(open_study(url, "mdc", {}), few())) == 3

    def test_a_file_of_something_else(self, tmp_path):
        (tmp_path / "trials.db").write_text("not a database " * 100)
        with pytest.raises(RunError, match="not a database"):
            open_study(f"sqlite:///{tmp_path / 'trials.db'}", "mdc", {})
        assert (tmp_path / "trials.db").read_text().startswith("not a database")

    def test_a_journal_is_a_storage(self, tmp_path):
        study = open_study(f"journal://{tmp_path / 'trials.log'}", "mdc", {"model": "a"})
        assert len(TestSearch().run(study, trials=4)) == 4


THREE = """
import os, sys, traceback
import sklearn.datasets, timm, vitrim.run.job, vitrim.methods.mdc
from vitrim import cli
children = []
for out in sys.argv[1:4]:
    child = os.fork()
    if not child:
        try:
            cli.app([*sys.argv[4:], "--out", out], standalone_mode=False)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


@pytest.mark.whole
def test_three_processes_share_a_search(tmp_path):
    """No trial lost or doubled, and each process ends with the same plan. Forked, for each import takes seconds."""
    from vitrim.deploy import store

    model = families.adopt(families.get("vit").example(depth=2))
    store.save(model, tmp_path / "model.safetensors", provenance={})
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    command = ["search", str(tmp_path / "model.safetensors"), "--storage", url, "--budget", "macs=0.8", "--trials", "7",
               "--data", "digits", "--set", "method.initial=4", "--set", "data.calibration=16",
               "--set", "data.validation=32"]  # fmt: skip
    plans = [str(tmp_path / f"{i}.json") for i in range(3)]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", THREE, *plans, *command], capture_output=True,
                          timeout=HANGS, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    study = optuna.load_study(study_name="mdc", storage=url)
    done = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    assert len(done) == 7
    assert len({json.dumps(trial.params, sort_keys=True) for trial in done}) == 7
    assert not study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
    assert len({(tmp_path / f"{i}.json").read_text() for i in range(3)}) == 1
    with pytest.raises(RunError, match="must be of the same space"):
        cli.app([*command, "--budget", "macs=0.7"], standalone_mode=False)
    with pytest.raises(MethodError, match="use a method with trials, but taylor has none"):
        cli.app([*command, "--method", "taylor"], standalone_mode=False)
