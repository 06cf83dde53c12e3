"""The MLP of a block, with or without a gate.

B images, N tokens, D width, M hidden neurons.

Parameters carry timm's names (``Mlp``, ``GluMlp``, ``SwiGLU``), so a dense block loads timm's weights as they are.
"""

from torch import Tensor, nn

from vitrim.nn.axis import Axis, Member, Tap
from vitrim.nn.layers import make_activation, make_norm
from vitrim.spec import Form

__all__ = ["Mlp"]


class Mlp(nn.Module):
    """Two linear layers with an activation between, or a gated product of two in place of the first.

    A neuron is what enters the last linear layer: with a gate it is one entry of the product, and owns a row of both
    factors.

    Args:
        width: D.
        hidden: M, at least 1.
        form: which of the three, biases, activation, norm and dropout.
    """

    def __init__(self, width: int, hidden: int, form: Form) -> None:
        super().__init__()
        self.kind, self.gate_first, self.hidden = form.mlp, form.gate_first, hidden
        self.tied = form.hidden_norm is not None
        if form.mlp == "swiglu":
            self.fc1_g = nn.Linear(width, hidden, bias=form.hidden_bias)
            self.fc1_x = nn.Linear(width, hidden, bias=form.hidden_bias)
        else:
            self.fc1 = nn.Linear(width, form.factors * hidden, bias=form.hidden_bias)
        self.act = make_activation(form.activation)
        self.tap = Tap()
        self.drop1 = nn.Dropout(form.drop)
        self.norm = make_norm(form.hidden_norm, hidden) if form.hidden_norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, width, bias=form.mlp_out_bias)
        self.drop2 = nn.Dropout(form.drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map normed tokens ``(B, N, D)`` to ``(B, N, D)``."""
        if self.kind == "plain":
            x = self.act(self.fc1(x))
        elif self.kind == "swiglu":
            x = self.act(self.fc1_g(x)) * self.fc1_x(x)
        else:
            a, b = self.fc1(x).chunk(2, dim=-1)
            x = self.act(a) * b if self.gate_first else a * self.act(b)
        x = self.norm(self.drop1(self.tap(x)))
        out: Tensor = self.drop2(self.fc2(x))
        return out

    def axes(self) -> tuple[Axis, ...]:
        """The hidden neurons; names are relative to the block."""
        firsts = [("fc1_g", 0), ("fc1_x", 0)] if self.kind == "swiglu" else [("fc1", 0)]
        if self.kind == "glu":
            firsts.append(("fc1", self.hidden))
        rows = tuple(
            Member(parameter=f"mlp.{layer}.{name}", dim=0, offset=offset)
            for layer, offset in firsts
            for name, parameter in getattr(self, layer).named_parameters()
            if parameter is not None
        )
        columns = (Member(parameter="mlp.fc2.weight", dim=1, offset=0),)
        return (
            Axis(
                name="hidden",
                groups=(self.hidden,),
                members=rows + columns,
                taps=("mlp.tap",),
                scales=() if self.tied else columns,
                tied=self.tied,
            ),
        )
