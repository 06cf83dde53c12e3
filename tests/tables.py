"""Tables of times that nobody measured: of machines that do what they are told."""

from vitrim.words.costs import attention_macs, conv_macs, mlp_macs
from vitrim.words.spec import Attention
from vitrim.words.table import Machine, StageTimes, TimeTable

MACHINE = Machine(device="none", batch=8, threads=1, dtype="float32", torch="0")


def proportional(spec, host=1e-4, narrow=()):
    """A table of a machine whose times are exactly proportional to macs.

    With `narrow`, shares of the residual width, it also knows the times there; `host` is then in proportion to it.
    """
    stages = _stages(spec)
    smaller = [
        _stages(
            spec.model_copy(update={"stages": [s.model_copy(update={"width": _part(s, one)}) for s in spec.stages]})
        )
        for one in narrow
    ]
    stages = [
        times.model_copy(update={"narrower": tuple(others[index] for others in smaller)})
        for index, times in enumerate(stages)
    ]
    hosts = tuple(host * _part(spec.stages[0], one) / spec.stages[0].width for one in narrow)
    return TimeTable(machine=MACHINE, stages=stages, host=host, hosts=hosts, dense=1.0)


def _part(stage, share):
    return round(share * stage.width)


def _stages(spec):
    stages = []
    for stage in spec.stages:
        mixer = next(block.mixer for block in stage.blocks if isinstance(block.mixer, Attention))
        heads, channels = tuple(range(1, len(mixer.v) + 1)), tuple(range(1, max(mixer.v) + 1))
        tokens = (*range(stage.tokens // 2, stage.tokens), stage.tokens) if stage.window is None else (stage.tokens,)
        most = max(block.hidden for block in stage.blocks)
        hidden = (1, most)
        stages.append(
            StageTimes(
                width=stage.width,
                grid=stage.grid,
                tokens=tokens,
                heads=heads,
                channels=channels,
                attention=[
                    [[1e-9 * attention_macs(n, stage.width, h * k, h * k) for k in channels] for h in heads]
                    for n in tokens
                ],
                hidden=hidden,
                conv={str(k): 1e-9 * conv_macs(stage.patches, stage.width, channels[-1], k) for k in (1, 3)},
                mlp=[[1e-9 * mlp_macs(n, stage.width, m, stage.form.factors) for m in hidden] for n in tokens],
            )
        )
    return stages
