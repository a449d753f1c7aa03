"""Windows hold every token of what is cut, and no more than they may."""

from hypothesis import given, strategies

from sparse_attn.cutting import Cut


@given(
    strategies.integers(0, 4),
    strategies.integers(0, 60),
    strategies.integers(0, 3),
    strategies.integers(1, 20),
    strategies.integers(0, 8),
)
def test_windows_advance_by_their_room_less_the_stride(before, tokens, after, room, stride):
    segments = [None] * before + [1] * tokens + [None] * after
    cut = Cut(segments, 1, before + room + after, stride)
    assert (cut.tokens, cut.room) == (tokens, room)
    items = list(range(len(segments)))
    if tokens > room and stride >= room:
        assert cut.bounds == []
        return
    parts = []
    for bounds in cut.bounds:
        window = cut.window(items, bounds)
        assert window[:before] == items[:before] and window[len(window) - after :] == items[len(items) - after :]
        assert len(window) <= before + room + after
        parts.append(window[before : len(window) - after])
        assert all(window[cut.place(token, bounds)] == token for token in parts[-1])
    assert all(left[len(left) - stride :] == right[:stride] for left, right in zip(parts, parts[1:]))
    assert all(len(part) == room for part in parts[:-1])
    assert [token for left, part in zip([[], *parts], parts) for token in part if token not in left] == (
        items[before : before + tokens]
    )
