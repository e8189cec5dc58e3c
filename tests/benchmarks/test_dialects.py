"""The benchmark of dialects: its corpus, its measures, and that it runs."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import dialects
from megatron_moe.config.moe import MoEConfig
from megatron_moe.data.indexed_dataset import IndexedDataset
from megatron_moe.moe.policies import build_policy
from megatron_moe.moe.tokens import NO_INFO

ROOT = Path(__file__).resolve().parents[2]


def test_a_document_names_its_dialect_and_fills_a_sample(tmp_path):
    indexed = IndexedDataset(str(dialects.write_corpus(tmp_path / "corpus", 16)))
    assert set(indexed.sizes.tolist()) == {dialects.LENGTH}
    assert [int(indexed[i][0]) - dialects.WORDS for i in range(16)] == [*range(8)] * 2


def test_words_follow_their_dialect_as_often_as_stated(tmp_path):
    indexed = IndexedDataset(str(dialects.write_corpus(tmp_path / "corpus", 8 * 400)))
    pairs: dict[tuple[int, int], list[int]] = {}
    for i in range(len(indexed)):
        words = indexed[i][1:].tolist()
        for a, b in itertools.pairwise(words):
            pairs.setdefault((i % 8, a), []).append(b)
    kept = sum(max(map(follows.count, set(follows))) for follows in pairs.values())
    share = kept / sum(map(len, pairs.values()))
    assert share == pytest.approx(1 - dialects.NOISE, abs=0.02)
    favourites = [tuple(max(set(f), key=f.count) for (d, _), f in sorted(pairs.items()) if d == dialect) for dialect in range(8)]
    assert len(set(favourites)) == 8


def test_entropy_is_that_of_the_corpus():
    """Averaged over the labels of a document: a word out of 512, 62 words after another, and the name of the next dialect."""
    probabilities = [0.9 + 0.1 / 512] + [0.1 / 512] * 511
    after_another = -sum(p * math.log(p) for p in probabilities)
    assert dialects.entropy() == pytest.approx((math.log(512) + 62 * after_another + math.log(8)) / 64)


def test_mutual_information_of_specialists_is_three_bits_and_of_chance_none():
    assert dialects.mutual_information(torch.eye(8)) == pytest.approx(3.0)
    assert dialects.mutual_information(torch.ones(8, 4)) == pytest.approx(0.0, abs=1e-12)
    assert dialects.mutual_information(torch.eye(8).repeat_interleave(2, dim=1)) == pytest.approx(3.0)


def test_random_routing_leaves_the_logits_out_of_the_choice():
    logits = torch.zeros(4000, 8)
    logits[:, 3] = 50.0
    policy = build_policy(MoEConfig(num_experts=(8,)))
    with dialects.by_chance(0):
        ids = policy(logits, NO_INFO, None, None, True).ids_TK
    shares = torch.bincount(ids.flatten(), minlength=8) / 4000
    assert shares.min() > 0.1 and shares.max() < 0.15
    assert (policy(logits, NO_INFO, None, None, True).ids_TK == 3).all()


def test_it_runs_and_writes_what_it_found(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "dialects", "--quick", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("dialects-*.json")
    figures = json.loads(file.read_text())["figures"]
    assert set(figures["nats_above_entropy"]) == set(dialects.MODELS)
    assert figures["parameters"]["experts"] == figures["parameters"]["pyramid"]
    assert "learned experts against the dense model" in done.stdout
