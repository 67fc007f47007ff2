"""What surgery knows about layer types: which static attributes follow from the leaves' shapes.

``rebuild`` changes leaves; attributes such as ``out_features`` would go stale, and Flax's grouped
convolutions would fail on them. A *mending rule* of the layer's type sets them again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from cnnjax.surgery.walk import Shape, modules, statics

Mend = Callable[[Any, dict[str, Shape]], None]

_RULES: dict[type, Mend] = {}
_NAMES: dict[str, type] = {}


def register(
    cls: type,
    *,
    attributes: Mapping[str, tuple[str, int]] | None = None,
    name: str | None = None,
) -> Any:
    """Tells surgery about a layer type of your own.

    As a decorator of a mending rule, which gets the new layer (with its new leaves) and the old
    shapes of its leaves, and sets its static attributes in place::

        @surgery.register(MyLayer)
        def _(layer, old):
            layer.features = layer.weight.shape[-1]

    Or declared, without a rule, when each attribute is the size of a leaf's axis::

        surgery.register(MyLayer, attributes={"features": ("weight", -1)})

    A registered layer can also be put into a model with `replace` and saved: its constructor's
    arguments are read from attributes of the same names.

    Args:
      cls: the layer's class; the rule holds for its subclasses too.
      attributes: ``{attribute: (leaf, axis)}``; ``{}`` says that nothing goes stale.
      name: the name under which archives know the layer; the class's name by default.

    Raises:
      ValueError: if another class has the name already.
    """
    label = name or cls.__name__
    if _NAMES.get(label, cls) is not cls and _NAMES[label].__qualname__ != cls.__qualname__:
        raise ValueError(
            f"the layer name {label!r} is taken by {_NAMES[label].__module__}."
            f"{_NAMES[label].__qualname__}; pass name="
        )

    def put(rule: Mend) -> Mend:
        _RULES[cls] = rule
        _NAMES[label] = cls
        return rule

    if attributes is None:
        return put

    declared = dict(attributes)

    def rule(layer: Any, old: dict[str, Shape]) -> None:
        for attribute, (leaf, axis) in declared.items():
            setattr(layer, attribute, shape_of(layer, leaf)[axis])

    put(rule)
    return cls


def registered() -> dict[str, type]:
    """``{name: class}`` of the layer types that surgery knows."""
    return dict(_NAMES)


def name_of(cls: type) -> str | None:
    """The registered name of exactly this class, or None."""
    return next((name for name, known in _NAMES.items() if known is cls), None)


def rule_of(cls: type) -> Mend | None:
    """The mending rule of a class or of its nearest registered base."""
    return next((_RULES[base] for base in cls.__mro__ if base in _RULES), None)


def shape_of(layer: Any, leaf: str) -> Shape:
    """The shape of the layer's variable ``leaf`` (a path within the layer)."""
    for part in leaf.split("/"):
        layer = getattr(layer, part)
    return tuple((layer.get_raw_value() if isinstance(layer, nnx.Variable) else layer).shape)


def put(layer: Any, **attributes: int | tuple[int, ...]) -> None:
    """Sets static attributes, numbers and tuples of them, where they are others than before.

    NNX looks for data in every value that is set; what is static and stays so needs no look.
    """
    for name, value in attributes.items():
        old = layer.__dict__.get(name)
        if type(old) is type(value) and old == value:
            continue
        if type(value) in (int, tuple) and layer._pytree__nodes.get(name) is False:
            layer.__dict__[name] = value
        else:
            setattr(layer, name, value)


def mend(
    model: nnx.Module,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    static: Mapping[str, Mapping[str, Any]] | None = None,
    found: Mapping[str, nnx.Module] | None = None,
) -> dict[str, dict[str, Any]]:
    """Sets the static attributes of every layer whose leaves changed shape, in place.

    Args:
      model: a fresh module that holds the new leaves.
      old: the leaves before, by path.
      new: the leaves after, by path.
      static: attributes to set first, by module path (e.g. a new ``feature_group_count``).
      found: the modules of ``model`` by path, children first, where they are known.

    Returns:
      The attributes that changed: ``{module path: {attribute: new value}}``.

    Raises:
      ValueError: if a layer of an unknown type holds a changed leaf and an attribute that equals a
        size that is gone; if a layer's rule finds shapes that cannot be.
      KeyError: if ``static`` names a module that does not exist.
    """
    static = dict(static or {})
    before = {p: tuple(leaf.shape) for p, leaf in old.items()}
    changed = [p for p, leaf in new.items() if before.get(p) != tuple(leaf.shape)]
    report: dict[str, dict[str, Any]] = {}
    touched_at: dict[str, list[str]] = {}  # the module's own leaves; [] where those below changed
    for leaf in sorted(changed):
        owner, _, name = leaf.rpartition("/")
        touched_at.setdefault(owner, []).append(name)
        while owner:
            owner = owner.rpartition("/")[0]
            touched_at.setdefault(owner, [])
    shapes_at = _Shapes(before)
    for path, module in (modules(model) if found is None else found).items():
        given = static.pop(path, {})
        touched = path in touched_at
        if not touched and not given:
            continue
        was = dict(vars(module))
        for attribute, value in given.items():
            setattr(module, attribute, value)
        rule = rule_of(type(module))
        if touched and rule is not None:
            try:
                rule(module, shapes_at.below(path))
            except ValueError as error:
                raise ValueError(f"{path or 'the root'}: {error}") from error
        elif touched and touched_at[path]:
            _refuse_stale(module, path, before, new, touched_at[path], given)
        # only attributes that were set anew can differ; variables are never set here
        if diff := {
            k: v
            for k, v in vars(module).items()
            if v is not was.get(k) and not k.startswith("_pytree__") and v != was.get(k)
        }:
            report[path] = diff
    if static:
        raise KeyError(f"no module at {sorted(static)[0]!r} to set attributes on")
    return report


class _Shapes:
    """Shapes of leaves, found by the module above them."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.own: dict[str, dict[str, Shape]] = {}
        self.inner: dict[str, dict[str, None]] = {}  # the modules right below, in order
        for path, shape in shapes.items():
            owner, _, name = path.rpartition("/")
            if owner not in self.own and owner:
                self._link(owner)
            self.own.setdefault(owner, {})[name] = shape

    def _link(self, path: str) -> None:
        while path:
            above, _, name = path.rpartition("/")
            seen = self.inner.setdefault(above, {})
            if name in seen:
                return
            seen[name] = None
            path = above

    def below(self, path: str) -> dict[str, Shape]:
        """``{path within the module: shape}``."""
        out = dict(self.own.get(path, {}))
        for name in self.inner.get(path, {}):
            inside = self.below(f"{path}/{name}" if path else name)
            out |= {f"{name}/{p}": shape for p, shape in inside.items()}
        return out


def _refuse_stale(
    module: nnx.Module,
    path: str,
    before: Mapping[str, Shape],
    new: Mapping[str, Any],
    touched: list[str],
    given: Mapping[str, Any],
) -> None:
    prefix = f"{path}/" if path else ""
    gone: dict[int, str] = {}
    for name in touched:
        was, now = before[prefix + name], tuple(new[prefix + name].shape)
        for axis, (a, b) in enumerate(zip(was, now)):
            if a != b:
                gone[a] = f"{name} axis {axis}: {a} -> {b}"
    for attribute, value in statics(module).items():
        if attribute in given:
            continue
        sizes = value if isinstance(value, tuple) else (value,)
        for size in sizes:
            if isinstance(size, int) and not isinstance(size, bool) and size in gone:
                raise ValueError(
                    f"surgery does not know the layer type {type(module).__name__} at "
                    f"{path or 'the root'!r}: its attribute {attribute!r} = {value!r} would go "
                    f"stale ({gone[size]}). Register it: surgery.register("
                    f"{type(module).__name__}, attributes={{{attribute!r}: (leaf, axis)}}), or "
                    f"attributes={{}} if nothing depends on it"
                )
