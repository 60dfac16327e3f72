"""Values: what a model computes at one place, in terms of the nodes of a graph; affine parts are folded as they come.

A value is a sum of terms, each an affine function of one node: the input, or what an activation gave. It becomes nodes
of its own only where something that is not affine takes it. So shifts, scales, convolutions and normalisations, in any
order, end in one affine layer, and so do linear branches: ``x + W x`` is the layer ``I + W``.

Zero padding adds zeros AFTER a shift, so the shift of an input to a padded convolution becomes a bias that is different
at the borders.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax import Array

from lipjax.networks import composing, folding
from lipjax.networks.activations import Activation
from lipjax.networks.graph import Concatenation, Graph, Network, Sum
from lipjax.networks.layers import Affine, Dense, Scale, Shape, dense
from lipjax.networks.pooling import MaxPoolActivation
from lipjax.networks.rearranging import gather, sum_over


@dataclasses.dataclass(frozen=True)
class Term:
    """A layer without its bias on the value of a node; or, where there is none, a scale; or the value itself.

    Attributes:
        node: of the graph.
        layer: or None.
        scale: broadcasts to the value, or None.
    """

    node: int
    layer: Affine | None = None
    scale: Array | None = None


@dataclasses.dataclass(frozen=True)
class Value:
    """What a model computes at one place, for one example.

    Attributes:
        graph: that it is a part of.
        shape: of it.
        terms: that it is the sum of, one per node.
        shift: that is added, broadcasts to the shape, or None.
    """

    graph: Graph
    shape: Shape
    terms: tuple[Term, ...]
    shift: Array | None = None

    @classmethod
    def of_input(cls, shape: Shape) -> Value:
        """The input of a new graph."""
        graph = Graph(tuple(shape))
        return cls(graph, tuple(shape), (Term(graph.input),))

    def affine(self, layer: Affine) -> Value:
        """``W a + b`` of this value, raveled in C order to what the layer takes.

        Raises:
            ValueError: it does not fit.
        """
        if math.prod(layer.in_shape) != math.prod(self.shape):
            raise ValueError(f"{type(layer).__name__} takes {layer.in_shape}, but its input has shape {self.shape}")
        (term, *others), whole = self.terms, layer
        if term.layer is not None:
            whole = composing.composed(term.layer, layer)
        elif term.scale is not None and layer.alone:
            whole = None
        elif term.scale is not None:
            whole = folding.rescaled(layer, before=_arranged(term.scale, self.shape, layer.in_shape))
        if others or whole is None:
            return self.settled().affine(layer)
        shift = layer.shift
        if self.shift is not None:
            shift = shift + layer.linear(jnp.broadcast_to(self.shift, self.shape).reshape(layer.in_shape))
        return Value(self.graph, layer.out_shape, (Term(term.node, whole),), shift)

    def rescaled(self, scale: Array, shift: Array | None = None) -> Value:
        """``scale * a + shift`` entry by entry, for arrays that broadcast to this value."""
        scale = self._aligned(scale)
        if self._alone:
            return self.settled().rescaled(scale, shift)
        terms = []
        for term in self.terms:
            if term.layer is None:
                terms.append(Term(term.node, scale=scale if term.scale is None else term.scale * scale))
            else:
                after = _arranged(scale, self.shape, term.layer.out_shape)
                terms.append(Term(term.node, folding.rescaled(term.layer, after=after)))
        before = None if self.shift is None else self.shift * scale
        return self._with(tuple(terms), before).shifted(shift)

    def shifted(self, shift: Array | None) -> Value:
        """``a + shift`` for an array that broadcasts to this value."""
        if shift is None:
            return self
        shift = self._aligned(shift)
        return self._with(self.terms, shift if self.shift is None else self.shift + shift)

    def reshaped(self, shape: Shape) -> Value:
        """The same in another shape, in C order."""
        terms = tuple(
            term if term.scale is None else Term(term.node, scale=_arranged(term.scale, self.shape, shape))
            for term in self.terms
        )
        shift = None if self.shift is None else _arranged(self.shift, self.shape, shape)
        return Value(self.graph, tuple(shape), terms, shift)

    def activation(self, activation: Activation) -> Value:
        """What an activation gives for this value."""
        return self._node(self.graph.add(activation, self.settled().terms[0].node, arranged=(self.shape,)))

    def gathered(self, places: Array) -> Value:
        """The entries at some places of the raveled value, -1 for zero, shaped like those."""
        return self.affine(gather(places, self.shape))

    def summed(self, axes: tuple[int, ...]) -> Value:
        """The sum over some axes."""
        return self.affine(sum_over(axes, self.shape))

    def max_pooled(self, window: tuple, stride: tuple, padding: tuple) -> Value:
        """Maximum over windows of an image."""
        return self.activation(MaxPoolActivation(self.shape, window, stride, padding))

    def __add__(self, other: Value) -> Value:
        """The sum with another value of the same graph and shape."""
        if other.shape != self.shape:
            raise ValueError(f"a sum of values of shapes {self.shape} and {other.shape}: expected the same")
        if self._alone or other._alone:
            first, second = (value.settled() if value._alone else value for value in (self, other))
            return first + second
        if {term.node for term in self.terms} != {term.node for term in other.terms}:
            # An activation lies between, so that both cannot be one layer: what it took is a node that both take.
            first, second = (self.graph.settled.get(id(each), (each, each))[1] for each in (self, other))
            if first is not self or second is not other:
                return first + second
        terms = {term.node: term for term in self.terms}
        for term in other.terms:
            terms[term.node] = self._added(terms[term.node], term) if term.node in terms else term
        return self._with(tuple(terms.values()), self.shift).shifted(other.shift)

    def concatenated(self, *others: Value, axis: int = -1) -> Value:
        """This value and others side by side."""
        settled = [value.settled() for value in (self, *others)]
        places = (value.terms[0].node for value in settled)
        return self._node(self.graph.add(Concatenation(axis), *places, arranged=[value.shape for value in settled]))

    def settled(self) -> Value:
        """The same as one node, the same one each time."""
        (first, *rest), shift = self.terms, self.shift
        if not rest and shift is None and first.layer is None and first.scale is None:
            return self
        if id(self) not in self.graph.settled:
            self.graph.settled[id(self)] = self, self._settled()
        return self.graph.settled[id(self)][1]

    def _settled(self) -> Value:
        shift = self.shift
        # The shift goes into a layer where there is one.
        order = sorted(self.terms, key=lambda term: (term.layer is None, term.scale is None))
        places = []
        for term in order:
            if term.layer is None and term.scale is None and shift is None:
                places.append(term.node)
            else:
                layer = self._layer(term) if term.layer is None else term.layer
                places.append(self.graph.add(layer.biased(self._bias(layer, shift)), term.node))
            shift = None
        total = places[0]
        for place in places[1:]:
            total = self.graph.add(Sum(), total, place, arranged=(self.shape, self.shape))
        return Value(self.graph, self.shape, (Term(total),))

    def network(self) -> Network:
        """The network that ends here.

        Raises:
            TypeError: the last thing is not affine, with one output per class.
        """
        first, *rest = self.terms
        if len(self.shape) != 1 or (first.layer is None and not rest):
            raise TypeError("the last layer of the model must be a dense one, nnx.Linear: it gives the logits")
        if rest or first.layer is None:
            last, (classes,) = self.settled().terms[0].node, self.shape
            return self.graph.network(dense(jnp.eye(classes), jnp.zeros(classes), self.shape), last)
        return self.graph.network(first.layer.biased(self._bias(first.layer, self.shift)), first.node)

    @property
    def _alone(self) -> bool:
        """Whether a layer gives it that is left as it is."""
        return any(term.layer is not None and term.layer.alone for term in self.terms)

    def _with(self, terms: tuple[Term, ...], shift: Array | None) -> Value:
        return Value(self.graph, self.shape, terms, shift)

    def _node(self, place: int) -> Value:
        return Value(self.graph, self.graph.shape(place), (Term(place),))

    def _aligned(self, array: Array) -> Array:
        """With one axis for each of the value."""
        array = jnp.asarray(array)
        return array.reshape((1,) * (len(self.shape) - array.ndim) + array.shape)

    def _layer(self, term: Term) -> Affine:
        """A term without a layer as one."""
        scale = jnp.ones(()) if term.scale is None else term.scale
        kernel = jnp.broadcast_to(scale, self.shape)
        return Scale(kernel=kernel, bias=jnp.zeros_like(kernel), in_shape=self.shape, out_shape=self.shape)

    def _bias(self, layer: Affine, shift: Array | None) -> Array:
        """A shift of this value as the bias of a layer that gives it: per channel where that is enough."""
        if shift is None:
            return jnp.zeros(layer.out_shape[-1:], layer.dtype)
        if layer.out_shape == self.shape and self.shape and math.prod(shift.shape[:-1]) == 1:
            return jnp.broadcast_to(shift.reshape(-1), self.shape[-1:])
        return jnp.broadcast_to(shift, self.shape).reshape(layer.out_shape)

    def _added(self, first: Term, second: Term) -> Term:
        """The sum of two terms of the same node."""
        if first.layer is None and second.layer is None:
            ones = (jnp.ones(()) if term.scale is None else term.scale for term in (first, second))
            return Term(first.node, scale=self._aligned(sum(ones)))
        if first.layer is None or (second.layer is not None and isinstance(second.layer, Dense)):
            first, second = second, first
        layer, other = first.layer, second.layer
        assert layer is not None
        if other is None:
            scale = None if second.scale is None else _arranged(second.scale, self.shape, layer.in_shape)
            other = folding.diagonal(scale, layer)
        return Term(first.node, folding.added(layer, other))


def _arranged(array: Array, shape: Shape, new: Shape) -> Array:
    """An array that broadcasts to one shape, for another one in C order."""
    if tuple(shape) == tuple(new):
        return array
    if not new:
        return array.reshape(())
    if math.prod(array.shape[:-1]) == 1 and array.shape[-1:] in ((1,), tuple(new[-1:])):  # one for all, or per channel
        return array.reshape((1,) * (len(new) - 1) + array.shape[-1:])
    return jnp.broadcast_to(array, shape).reshape(new)
