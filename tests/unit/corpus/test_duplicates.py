"""Duplicates against brute force: exact Jaccard similarity of all pairs, graphs by plain search."""

import random

import numpy as np
import pytest

from data_tools.duplicates import Runs, exact_pairs, join
from data_tools.minhash import MinHash
from data_tools.words import split_words
from megatron_m3.manifest import BlockFolder


def edited(rng, words, share):
    return [rng.choice(words) if rng.random() < share else word for word in words]


def make_texts(rng, count):
    """Texts of made-up words; most have a few edited copies, from one word changed to a third of them."""
    vocabulary = ["".join(rng.choice("abcdefghij") for _ in range(5)) for _ in range(2000)]
    texts = []
    while len(texts) < count:
        words = [rng.choice(vocabulary) for _ in range(rng.randrange(60, 400))]
        texts.append(words)
        texts += [edited(rng, words, rng.choice([0.002, 0.01, 0.02, 0.04, 0.1, 0.3])) for _ in range(rng.randrange(3))]
    rng.shuffle(texts)
    return [" ".join(words) for words in texts]


def jaccard(one, other):
    return len(one & other) / len(one | other)


def test_estimates_scatter_around_the_similarity_as_theory_says():
    rng, minhash = random.Random(3), MinHash(num_perm=256, shingle=1)
    errors = []
    for _ in range(300):
        words = [f"w{rng.getrandbits(40)}" for _ in range(300)]
        common = rng.randrange(1, 200)
        one, other = words[: common + (300 - common) // 2], words[:common] + words[common + (300 - common) // 2 :]
        similarity = common / 300
        signatures = minhash.sign(*split_words([" ".join(one), " ".join(other)]))
        share = (signatures[0] == signatures[1]).mean()
        errors.append((share - similarity) / np.sqrt(similarity * (1 - similarity) / 256))
    assert abs(np.mean(errors)) < 0.25
    assert 0.85 < np.std(errors) < 1.15


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_keep_the_recall_and_no_more_rows_would(threshold):
    chance = lambda rows: 1 - (1 - threshold**rows) ** (128 // rows)  # noqa: E731
    minhash = MinHash(threshold=threshold)
    assert chance(minhash.rows) >= 0.95
    assert minhash.rows == 128 or chance(minhash.rows + 1) < 0.95
    assert minhash.bands * minhash.rows <= 128


def near_pairs_of(tmp_path, texts, minhash, num_parts, block=97):
    from data_tools.duplicates import NearPairs

    first_documents = np.arange(0, len(texts), block)
    runs = Runs(BlockFolder(tmp_path / f"{num_parts}", {"kind": "test"}), len(first_documents), num_parts)
    for index, first in enumerate(first_documents):
        signatures = np.concatenate([minhash.sign(words) for words in split_words(texts[first : first + block])])
        keys = minhash.band_keys(signatures).reshape(-1)
        order = np.argsort(keys, kind="stable")
        rows = np.arange(len(signatures), dtype=np.uint32)
        runs.write(index, {"key": keys[order], "row": np.repeat(rows, minhash.bands)[order]}, rows=rows,
                   signatures=signatures)
    near = NearPairs(runs, first_documents, minhash)
    return [near.find(part) for part in range(num_parts)]


def test_near_repeats_against_brute_force(tmp_path):
    minhash = MinHash()
    texts = make_texts(random.Random(1), 600)
    parts = near_pairs_of(tmp_path, texts, minhash, 1)
    shingles = [set(next(split_words([text])).hashes(minhash.shingle)[0].tolist()) for text in texts]
    alike = {(b, a): jaccard(shingles[a], shingles[b]) for b in range(len(texts)) for a in range(b)
             if shingles[a] & shingles[b]}
    groups = lambda pairs: {tuple(one) for one in join(iter([np.array(sorted(pairs)).reshape(-1, 2)])).tolist()}  # noqa: E731
    truth = groups([pair for pair, value in alike.items() if value >= minhash.threshold])
    found = groups(map(tuple, parts[0].tolist()))
    dropped, wanted = {one for one, _ in found}, {one for one, _ in truth}
    assert len(wanted) > 60
    recall, precision = len(dropped & wanted) / len(wanted), len(dropped & wanted) / len(dropped)
    print(f"recall {recall:.3f}, precision {precision:.3f} of {len(wanted)}")
    assert recall > 0.9
    assert precision > 0.9
    similar = [alike.get(tuple(pair), 0) for pair in parts[0].tolist()]
    assert min(similar) > minhash.threshold - 0.15
    surely = [pair for pair, value in alike.items() if value > minhash.threshold + 0.12]
    assert surely
    assert {later for later, _ in surely} <= dropped
    several = np.concatenate(near_pairs_of(tmp_path, texts, minhash, 7))
    assert groups(map(tuple, several.tolist())) == found


def test_exact_repeats_of_all_blocks_whatever_the_parts(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << 64, (60, 2), np.uint64)[rng.integers(0, 60, 500)]
    values[:40, 0] = 5  # equal in the first half only
    first_documents = np.arange(0, 500, 100)
    seen, wanted = {}, []
    for document, value in enumerate(map(tuple, values.tolist())):
        if value in seen:
            wanted.append([document, seen[value]])
        seen.setdefault(value, document)
    for num_parts in (1, 3, 64):
        runs = Runs(BlockFolder(tmp_path / f"{num_parts}", {"kind": "test"}), 5, num_parts)
        for index, first in enumerate(first_documents):
            some = values[first : first + 100]
            order = np.argsort(some[:, 0], kind="stable")
            runs.write(index, {"key": some[order, 0], "rest": some[order, 1], "row": order.astype(np.uint32)})
        parts = [exact_pairs(runs, first_documents, part) for part in range(num_parts)]
        assert sorted(np.concatenate(parts).tolist()) == wanted


def test_groups_of_random_graphs_against_search():
    rng = random.Random(5)
    for edges in (0, 5, 40, 90):
        pairs = [(max(a, b), min(a, b)) for a, b in (rng.sample(range(100), 2) for _ in range(edges))]
        first = {node: node for pair in pairs for node in pair}
        for _ in first:
            for a, b in pairs:
                first[a] = first[b] = min(first[a], first[b])
        parts = [np.array(pairs[start : start + 10]).reshape(-1, 2) for start in range(0, edges, 10)]
        assert join(iter(parts)).tolist() == [[node, least] for node, least in sorted(first.items()) if node != least]
