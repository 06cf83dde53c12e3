"""The MLP of a block, with or without a gate.

B images, N tokens, D width, M hidden neurons.

Parameters have timm's names (``Mlp``, ``GluMlp``, ``SwiGLU``, and ViTamin's ``GeGluMlp``), so a dense block loads
timm's weights without conversion.
"""

from torch import Tensor, nn

from vitrim.nn.axis import Axis, Member, Tap, columns, rows
from vitrim.nn.layers import make_activation, make_norm
from vitrim.words.spec import NO_RATES, Form, Rates

__all__ = ["LAYERS", "Mlp"]

LAYERS = {
    "plain": ("fc1", "fc2"),
    "glu": ("fc1", "fc2"),
    "swiglu": ("fc1_g", "fc1_x", "fc2"),
    "geglu": ("w0", "w1", "w2"),
}
"""Names of the linear layers of each kind, the output layer last.

If there are two factors, the activation is applied to the first.
"""


class Mlp(nn.Module):
    """Two linear layers with an activation between, or a gated product of two in place of the first.

    A neuron is one input of the last linear layer. In a gated MLP it is one entry of the product, and has a row in both
    factors.

    Args:
        width: D.
        hidden: M, at least 1.
        form: kind of MLP, biases, activation and norm.
        rates: dropout.
    """

    fc1: nn.Linear
    fc1_g: nn.Linear
    fc1_x: nn.Linear
    w0: nn.Linear
    w1: nn.Linear
    w2: nn.Linear
    fc2: nn.Linear

    def __init__(self, width: int, hidden: int, form: Form, rates: Rates = NO_RATES) -> None:
        super().__init__()
        if form.mlp == "geglu":
            self.norm = make_norm(form.inner_norm, width) if form.inner_norm else nn.Identity()
        self.kind, self.gate_first, self.hidden = form.mlp, form.gate_first, hidden
        self.tied = form.hidden_norm is not None
        *self.firsts, self.last = LAYERS[form.mlp]
        for name in self.firsts:
            self.add_module(name, nn.Linear(width, form.factors * hidden // len(self.firsts), bias=form.hidden_bias))
        self.act = make_activation(form.activation)
        self.tap = Tap()
        self.drop1 = nn.Dropout(rates.hidden)
        if form.mlp != "geglu":
            self.norm = make_norm(form.hidden_norm, hidden) if form.hidden_norm else nn.Identity()
        self.add_module(self.last, nn.Linear(hidden, width, bias=form.mlp_out_bias))
        self.drop2 = nn.Dropout(rates.output)

    def forward(self, x: Tensor) -> Tensor:
        """Map normed tokens ``(B, N, D)`` to ``(B, N, D)``."""
        if self.kind == "plain":
            x = self.act(self.fc1(x))
        elif self.kind == "swiglu":
            x = self.act(self.fc1_g(x)) * self.fc1_x(x)
        elif self.kind == "geglu":
            x = self.norm(x)
            x = self.act(self.w0(x)) * self.w1(x)
        else:
            a, b = self.fc1(x).chunk(2, dim=-1)
            x = self.act(a) * b if self.gate_first else a * self.act(b)
        x = self.drop1(self.tap(x))
        out: Tensor = self.drop2(self.w2(x) if self.kind == "geglu" else self.fc2(self.norm(x)))
        return out

    def axes(self) -> tuple[Axis, ...]:
        """Return the axis of hidden neurons; names are relative to the block."""
        firsts = [(name, 0) for name in self.firsts]
        if self.kind == "glu":
            firsts.append(("fc1", self.hidden))
        rows = tuple(
            Member(parameter=f"mlp.{layer}.{name}", dim=0, offset=offset)
            for layer, offset in firsts
            for name, parameter in getattr(self, layer).named_parameters()
            if parameter is not None
        )
        columns = (Member(parameter=f"mlp.{self.last}.weight", dim=1, offset=0),)
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

    def stream(self) -> tuple[Member, ...]:
        """Return the slices of parameters that the channels of the residual stream index, as in `axes`."""
        found = [member for name in self.firsts for member in columns(f"mlp.{name}", getattr(self, name))]
        inner = rows("mlp.norm", self.norm) if self.kind == "geglu" else ()
        return (*found, *inner, *rows(f"mlp.{self.last}", getattr(self, self.last)))
