"""What a search's space promises of a cut, from the cut alone."""

from lmboost.surgery import subnet

ROW = ("num_kv_heads", "group_heads", "head_dim", "mlp_dim")


def check_cut(space, cut):
    """Fails unless a cut is of the space: its entries, its sizes, its number of parameters."""
    orders, o = space.orders, space.parent
    fine, uniform = space.granularity == "fine", space.scope == "uniform"
    layers = [part.layer for part in cut.layers]
    rows = [(len(c.groups), len(c.heads[0]), len(c.features), len(c.units)) for c in cut.layers]
    assert len(layers) in space.layers and layers == sorted(set(layers)) and 0 <= layers[0] <= layers[-1] < o.num_layers
    assert len(cut.width) in space.d_model
    assert all(size in getattr(space, name) for row in rows for name, size in zip(ROW, row, strict=True))
    assert not uniform or len(set(rows)) == 1
    assert not (uniform and fine) or len({part[1:] for part in cut.layers}) == 1
    if space.layer_choice == "first":
        assert set(layers) == set(orders.layers[: len(layers)])
    entries = [(cut.width, orders.width)]
    for part in cut.layers:
        assert len(part.heads) == len(part.groups) and len(set(map(len, part.heads))) == 1
        own = ((name, getattr(orders, name)[part.layer]) for name in ("groups", "features", "units"))
        entries += [(getattr(part, name), order) for name, order in own]
        entries += [(h, orders.heads[part.layer][k]) for k, h in zip(part.groups, part.heads, strict=True)]
    for kept, order in entries:
        assert list(kept) == sorted(set(kept)) and set(kept) <= set(order)
        assert fine or set(kept) == set(order[: len(kept)])
    assert space.low <= subnet.child_config(space.parent, cut).validate().num_params() <= space.high
