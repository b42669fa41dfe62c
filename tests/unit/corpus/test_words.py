"""Words and their hashes against Python's own string functions, and every rule of the filter on both of its sides."""

import itertools
import math
import random
import unicodedata
from collections import Counter

import numpy as np
import pytest

from data_tools import words as words_module
from data_tools.languages import detect
from data_tools.minhash import MinHash
from data_tools.rules import Rules
from data_tools.words import split_words


def words_of(text):
    [found] = split_words([text])
    whole = found.spelt(0).decode("utf-32-le")
    assert whole == " ".join(whole.split())
    words = [whole[first:last] for first, last in zip(found.starts, found.ends, strict=True)]
    assert words == whole.split()
    return words


@pytest.mark.parametrize(("text", "words"), [
    ("Don’t  stop—the 3 cats' Café!", ["dont", "stop", "the", "3", "cats", "café"]),
    ("我们ab中。文 x", ["我", "们", "ab", "中", "文", "x"]),
    ("हिन्दी में", ["हिन्दी", "में"]),
    (" \n!?… ", []),
    ("a", ["a"]),
    ("CAFE\u0301", ["café"]),
])
def test_words_of_several_scripts(text, words):
    assert words_of(text) == words


def test_words_of_ascii_text_are_those_of_python():
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("aBc9 \t.-,") for _ in range(rng.randrange(60)))
        plain = "".join(one.lower() if one.isalnum() else " " for one in text)
        assert words_of(text) == plain.split()


@pytest.mark.parametrize("most", [1, 40, 1 << 16])
def test_texts_together_give_what_each_gives_alone(most, monkeypatch):
    monkeypatch.setattr(words_module, "CHARACTERS_AT_A_TIME", most)
    rng = random.Random(2)
    texts = ["", "中", "…", *("".join(rng.choices("aÉ中'’ \n.9Σ\u0301", k=rng.randrange(80))) for _ in range(60)), ""]
    together = list(split_words(texts))
    for run in (1, 5):
        hashes = [found[first:last].tolist() for words in together for found, firsts in [words.hashes(run)]
                  for first, last in itertools.pairwise(firsts)]
        assert hashes == [next(split_words([text])).hashes(run)[0].tolist() for text in texts]
    spelt = [words.spelt(text) for words in together for text in range(len(words.letters))]
    assert spelt == [next(split_words([text])).spelt(0) for text in texts]
    signatures = np.concatenate([MinHash().sign(words) for words in together])
    assert (signatures == np.concatenate([MinHash().sign(*split_words([text])) for text in texts])).all()
    rules = Rules(min_words=3, max_word_length=3, max_non_alphabetic=0.6, max_unique_words=0.9, min_entropy=1.2)
    broken = [found for words in together for found in rules.broken_by(words)]
    assert len({found and found[0] for found in broken}) == 6
    assert broken == [rules.broken_by(next(split_words([text])))[0] for text in texts]


@pytest.mark.parametrize("run", [1, 2, 5])
def test_hashes_are_equal_where_and_only_where_runs_are(run):
    rng = random.Random(run)
    seen = {}
    for _ in range(50):
        words = [rng.choice(["a", "ab", "b", "ba", "中", "the"]) for _ in range(rng.randrange(1, 60))]
        hashes, _ = next(split_words([" ".join(words)])).hashes(run)
        length = min(run, len(words))
        runs = [tuple(words[first : first + length]) for first in range(len(words) - length + 1)]
        assert len(hashes) == len(runs)
        for one, value in zip(runs, hashes.tolist(), strict=True):
            assert seen.setdefault(one, value) == value
    assert len(set(seen.values())) == len(seen) > 5


def text_of(count, distinct, length=4):
    return " ".join("".join(chr(97 + number % distinct // 10**place % 10) for place in range(length))
                    for number in range(count))


@pytest.mark.parametrize(("kept", "dropped", "reason"), [
    (text_of(50, 25), text_of(49, 25), "too few words"),
    (text_of(60, 30, 10), text_of(60, 30, 11), "words too long"),
    (text_of(60, 30).ljust(800, "!"), text_of(60, 30).ljust(801, "!"), "too few letters"),
    (text_of(100, 95), text_of(100, 96), "too many unique words"),
    (text_of(104, 13), text_of(96, 12), "too little entropy"),
])
def test_each_rule_drops_on_its_side_only(kept, dropped, reason):
    [words] = split_words([kept, dropped, kept])
    assert [found and found[0] for found in Rules().broken_by(words)] == [None, reason, None]


def test_values_of_the_rules_are_those_of_the_definitions():
    text = "the cat saw the dog and the dog saw the cat " * 6
    counts = Counter(text.split())
    total = sum(counts.values())
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    [words] = split_words([text])
    [broken] = Rules(min_entropy=10).broken_by(words)
    assert broken == ("too little entropy", pytest.approx(entropy))
    [broken] = Rules(max_unique_words=0).broken_by(words)
    assert broken == ("too many unique words", pytest.approx(len(counts) / total))
    letters = sum(one.isalpha() for one in text)
    [broken] = Rules(max_non_alphabetic=0).broken_by(words)
    assert broken == ("too few letters", pytest.approx(1 - letters / len(text)))


def test_decomposed_letters_count_as_they_do_composed():
    text = "박물관은 아홉 시에 열리고 표는 입구에서 판매됩니다 " * 9
    for one in (text, unicodedata.normalize("NFD", text)):
        [words] = split_words([one])
        assert (words.letters.item(), words.characters.item()) == (9 * 22, 9 * 29)


@pytest.mark.parametrize(("text", "language"), [
    ("The museum opens at nine, and the tickets are sold at the door.", "en"),
    ("THE MUSEUM OPENS AT NINE, AND THE TICKETS ARE SOLD AT THE DOOR.", "en"),
    ("博物馆九点开门，门票在入口处出售。", "zh"),
    ("Das Museum öffnet um neun Uhr, Karten gibt es am Eingang.", "de"),
    ("Le musée ouvre à neuf heures et les billets sont vendus à l'entrée.", "fr"),
    ("Музей открывается в девять часов, билеты продаются у входа.", "ru"),
    ("美術館は九時に開き、切符は入口で売られています。", "ja"),
    (unicodedata.normalize("NFD", "박물관은 아홉 시에 열리고 표는 입구에서 판매됩니다."), "ko"),
])
def test_language_of_a_sentence(text, language):
    found, score = detect(text + "\n" + text, 1000)
    assert found == language
    assert 0.5 < score <= 1
