"""What a decoder layer keeps for backward, in bytes a token, and what backward has beside it.

The terms are those of ``nf4.shared``, ``model.elementwise`` and ``model.layer``, function by
function. H is the width of the residual stream, Q of all queries, K of all keys, I of the MLP, e
the bytes of an activation:

    recompute   the layer's input                                             e·H
    save        beside it:
      norms       their outputs, and the sum between them                      3·e·H
      projected   q, k, v as they are projected (one product: one tensor)      e·(Q + 2K)
      attention   q and k turned, what attention gives                        e·(2Q + K)
      mlp         gate, up, and their product                                  3·e·I
      adapters    x Aᵀ of each linear                                          e·Σr
      statistics  of norms and of attention, float32                           4·(2 + heads)
    offload     nothing on the card, but for the inputs of the layers under way

Layers that are run as transformers has them keep more: norms keep the float32 copy they compute in
(in place of what it is a copy of), and the MLP silu(gate). Where heads are normed, q and k are kept
as they were before, too.

In backward the layer's own activations are there in any case (kept, or made again), and at the
peak, in the middle of the MLP, the gradients of gate and up beside them. The gradient that goes
down the layers is as wide as the stream; CUDA graphs are handed it in a tensor of their own, and
hand the last layer's output over in another.
"""

from dataclasses import dataclass

from halfbyte.plan.shape import ModelShape

# Of the layers that are run again, so many before the first that keeps stay on the card: backward
# asks for them first. Of the others', so many inputs are there at a time, sent or fetched.
NEAR_LAYERS = 1
UNDER_WAY = 1


@dataclass(frozen=True)
class LayerActivations:
    """Bytes a token of one decoder layer.

    Attributes:
        shape: The model's widths.
        itemsize: Bytes of an activation.
        ranks: Sum of the ranks of the adapters in a layer.
        fused: Whether layers are run by ``model.layer``.
        on_gpu: Whether they are on a GPU.
    """

    shape: ModelShape
    itemsize: int
    ranks: int
    fused: bool
    on_gpu: bool

    @property
    def input(self) -> int:
        """The layer's input."""
        return self.itemsize * self.shape.hidden

    def kept(self) -> dict[str, int]:
        """Return what the functions of a layer keep beside its input, by term."""
        s, e = self.shape, self.itemsize
        wide = e if self.fused else 4  # norms keep what they compute in
        norms = 2 * e * s.hidden + (e * s.hidden if wide == e else 2 * wide * s.hidden)
        projected = e * (s.query + 2 * s.key_value)
        attention = e * (2 * s.query + s.key_value)
        mlp = (3 if self.fused else 4) * e * s.intermediate
        statistics = 4 * 2
        if self.on_gpu:
            statistics += 4 * s.heads
            if self.fused and not s.head_norms:
                attention = e * s.query  # q and k are turned where they are
        else:
            # Separate products: of them v alone lives on. Attention's output is laid out anew.
            projected = e * s.key_value
            attention += e * s.query
        if s.head_norms:
            projected = e * s.key_value + wide * (s.query + s.key_value)
            statistics += 4 * (s.heads + s.heads * s.key_value // s.query)
        return {
            "norms": norms,
            "projected": projected,
            "attention": attention,
            "mlp": mlp,
            "adapters": e * self.ranks,
            "statistics": statistics,
        }

    @property
    def saved(self) -> int:
        """What a layer keeps that is not run again, its input included."""
        return self.input + sum(self.kept().values())

    @property
    def gradients(self) -> int:
        """What backward holds beside the layer's activations when it holds most."""
        s = self.shape
        wide = 2 if self.fused else 3
        if self.fused and self.on_gpu:
            wide = 1  # gate's and up's are written over gate and up
        return self.itemsize * (wide * s.intermediate + s.hidden)

    @property
    def backward(self) -> int:
        """What is alive at the peak of a layer's backward, its input and output apart."""
        return sum(self.kept().values()) + self.gradients


@dataclass(frozen=True)
class Dial:
    """What is done with a layer's activations, for all layers of a model.

    Attributes:
        saved: Layers, counted from the last, that keep what backward needs.
        offloaded: Layers, counted from the first, whose input waits on the host.
    """

    saved: int = 0
    offloaded: int = 0

    @classmethod
    def turned(cls, layers: int, saved: int, *, offload: bool) -> "Dial":
        """Return the dial with which ``saved`` layers keep, and others' inputs may wait away."""
        return cls(saved, max(0, layers - saved - NEAR_LAYERS) if offload else 0)

    def line(self, layers: int) -> str:
        """Return it in a few words."""
        if self.saved == layers:
            return "all kept"
        if self.offloaded:
            return f"{self.saved} kept + host" if self.saved else "on the host"
        return f"{self.saved} of {layers} kept" if self.saved else "all run again"


def kept_bytes(layer: LayerActivations, dial: Dial, tokens: int) -> int:
    """Return what all layers keep on the card between forward and backward.

    Args:
        layer: One layer.
        dial: What is kept.
        tokens: Of the whole optimizer step: all its micro-batches are under way together.
    """
    waiting = layer.shape.layers - dial.saved
    on_card = waiting - dial.offloaded + min(dial.offloaded, UNDER_WAY)
    return tokens * (dial.saved * layer.saved + on_card * layer.input)


def host_bytes(layer: LayerActivations, dial: Dial, tokens: int) -> int:
    """Return what waits in page-locked host memory."""
    return tokens * dial.offloaded * layer.input


def backward_bytes(layer: LayerActivations, dial: Dial, tokens: int, part_tokens: int) -> int:
    """Return what the last layer's backward has beside what is kept.

    Args:
        layer: One layer.
        dial: What is kept.
        tokens: Of the whole step; each has a gradient that goes down the layers.
        part_tokens: Of what passes through a layer together.
    """
    # A graph is handed the stream and hands it over; a part's gradient is made beside the last.
    own = 2 * tokens + part_tokens if layer.fused and layer.on_gpu else tokens
    alive = layer.gradients if dial.saved else layer.backward
    return own * layer.input + part_tokens * alive
