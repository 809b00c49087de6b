"""One scale, no colour at 0, signs without colour; nothing of a text is markup."""

import html as escapes
import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from rich.style import Style

from minirlhf.app import coloured

TOPS = [[["a", 0.5], [" b", 0.25]]]


def row(pieces, differences, **changes):
    ref_logp = np.full(len(pieces), -2.0)
    of = {"prompt": "x", "response": "".join(pieces), "pieces": pieces}
    of |= {"ids": list(range(len(pieces))), "logp": ref_logp + differences, "ref_logp": ref_logp}
    of |= {"entropy": np.ones(len(pieces)), "value": None, "reward_token": None, "advantage": None}
    of |= {"top": TOPS * len(pieces), "ref_top": TOPS * len(pieces)}
    of |= {"kl_seq": float(np.sum(differences)), "score": None, "gold": None, "kl_coef": 0.2}
    return of | changes


def shares(page):
    """(up or down, per cent of its colour) of each token."""
    found = re.findall(r'class="token (up|down)[^"]*"[^>]*--share: ([\d.]+)%', page)
    return [(side, float(share)) for side, share in found]


def test_colour_is_on_one_fixed_scale_and_no_colour_is_zero():
    ds = [0.0, 1.5, -1.5, 3.0, -30.0, 30.0]
    alone = shares(coloured.html([row(list("abcdef"), ds)]))
    assert [side for side, _ in alone] == ["down", "up", "down", "up", "down", "up"]
    full = alone[3][1]
    assert [share for _, share in alone] == [0.0, full / 2, full / 2, full, full, full]
    beside = shares(coloured.html([row(["z"], [99.0]), row(list("abcdef"), ds)]))
    assert beside[1:] == alone  # whatever stands beside it


@given(st.floats(-50, 50))
def test_marks_say_sign_and_size_without_colour(d):
    marks = coloured.marks(d)
    assert len(marks) == sum(abs(d) >= least for least in (0.1, 1.0, 2.0))
    assert set(marks) <= ({"+"} if d > 0 else {"\N{MINUS SIGN}"})


def test_the_line_under_the_words_ends_in_what_is_paid():
    page = coloured.html([row(list("ab"), [2.0, 1.0]), row(list("ab"), [-1.0, 0.5])])
    ends = re.findall(r"M0 ([\d.]+)L10 ([\d.]+)", page)
    (_, first), (second, top), (_, low), _ = ends
    assert first == second  # where a token begins the one before it ends
    assert float(top) == 1.0 and float(low) == 17.0  # the largest and the least sum of the page
    assert 'data-kl-seq="3.0">+3.00 nats' in page and ">-0.50 nats" in page


def test_a_text_is_text():
    evil = "<script>alert(1)</script>&"
    of = row([evil, " b"], [1.0, 0.0], prompt=evil, top=[[[evil, 0.5]]] * 2, gold=1.25, score=0.5)
    for document in (False, True):
        page = coloured.html([of], document=document)
        assert "<script" not in page and page.count(escapes.escape(evil)) >= 3 + document
        assert "gold +1.25" in page and "score +0.500" in page
        assert not re.search(r"https?:|src=|@import|url\(", page)
    assert '<span class="space">·</span>b' in page  # a space is seen


def test_the_extreme_tokens_are_named():
    of = row(["a", " b", " c"], [0.25, -4.0, 2.0])
    assert coloured.extremes([of], n=2) == [(-4.0, of, 1), (2.0, of, 2)]
    said = re.sub("<[^>]+>", "", coloured.html([of]))
    assert "·b -4.00 after “a”; \n·c +2.00 after “a b”; " in said


def test_the_terminal_shows_the_same_colours():
    line = coloured.text(row(["a", " b", " c"], [0.05, -3.0, 1.5]))
    assert line.plain == "a b c"
    backgrounds = {
        line.plain[of.start : of.end]: Style.parse(of.style).bgcolor for of in line.spans
    }
    assert backgrounds.pop("a", None) is None  # below the first mark there is none
    assert [of.name for of in backgrounds.values()] == ["#0072b2", "#eaae80"]
    assert list(backgrounds) == [" b", " c"]


def test_the_picture_is_a_file_that_opens(tmp_path):
    of = row(["a", "$b", "_c"] * 9, [0.5, -1.0, 0.0] * 9)
    path = coloured.picture({"one": of, "$two": of}, tmp_path / "a.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_the_span_holds_zero():
    assert coloured.span([]) == (0.0, 0.0)
    assert coloured.span([row(["a"], [2.0])]) == (0.0, 2.0)
    assert coloured.span([row(["a"], [2.0]), row(list("ab"), [-3.0, 1.0])]) == (-3.0, 2.0)
