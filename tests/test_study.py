"""docs/study: statistics, the second world, the steps of its arms, resuming, the tables."""

import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_policy, vector

import data
import metarm
import ppo
import rm

sys.path.append(str(Path(__file__).resolve().parents[1] / "docs" / "study"))

import arms
import measure
import page
import study
import summary

STUDY = Path(study.__file__).parent
FIRST, STALE = page.FIRST, page.STALE
NOTE = "\n\nHuman: Sum up this note: Anna went round on a rainy day. The pump in hall one leaks "
NOTE += "oil. It has to run by Monday.\n\nAssistant:"
SHOP = "\n\nHuman: My lamp came broken.\n\nAssistant:"


def test_intervals_and_p_values():
    half = 3.18245 * np.std([1, 2, 3, 4], ddof=1) / 2  # the t of 3 degrees of freedom
    assert page.t_test([1, 2, 3, 4])[:3] == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-4)
    assert page.t_test([1.0])[0] == 1.0 and np.isnan(page.t_test([1.0])[1:]).all()
    x = np.array([0.3, 1.1, 0.7, 2.0, 1.4])  # 0 at the interval's end is p = 0.05
    assert page.t_test(x - page.t_test(x)[1])[3] == pytest.approx(0.05, abs=1e-6)
    # Of many worlds, the smallest effect: (z of 0.9875 + z of 0.8) standard errors.
    assert page.smallest_effect(2.0, 400) == pytest.approx(3.083 * 2 / 20, rel=0.01)


def test_holm_and_verdicts_follow_the_rules():
    assert page.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = page.holm([0.01, math.nan, 0.02])
    assert adjusted[::2] == pytest.approx([0.02, 0.02]) and math.isnan(adjusted[1])
    assert page.better(3.0, 3.5, 0.01, 2.0) == "yes" and page.better(0.5, 1.9, 0.3, 2.0) == "no"
    assert page.better(0.5, 2.1, 0.3, 2.0) == page.better(3.0, 5.9, 0.2, 2.0) == "unclear"
    assert page.better(1, math.nan, math.nan, 2) == "unclear"
    assert page.better(-3, -1, 0.01, 2) == "no"


def test_arms_are_compared_head_by_head_and_then_by_world():
    rows = [("d", 7, "plain", head, "m", x) for head, x in enumerate([1.0, 5.0, 3.0])]
    rows += [("d", 7, FIRST, 1, "m", 6.0), ("d", 7, FIRST, 2, "m", 5.0)]
    rows += [("d", 8, FIRST, 0, "m", 2.0), ("other", 7, "plain", 1, "m", 99.0)]
    table = page.Table(rows, "d")
    assert table.gain(FIRST, "m") == {7: pytest.approx((1 + 2) / 2)}  # head 0 has no partner
    assert table.gain(page.RESEEDED, "m") == {7: pytest.approx((4 + 2) / 2)}
    assert table.get("plain", "m") == {7: 3.0} and table.get(FIRST, "m") == {7: 5.5, 8: 2.0}


def test_policies_are_compared_on_the_way_to_one_kl():
    ways = {"ppo:rm0": (1, 2, 3), "ppo:plain": (4, 4, 4), f"ppo:{FIRST}": (2, 4, 3)}
    rows = []
    for arm, kl in ways.items():  # three points a round: KL of the round's number, and gold 2 KL
        for r in (1, 2, 3):
            rows += [("d", 7, arm, r, f"path_kl{i}.{r}", kl[r - 1]) for i in range(3)]
            factor = 2 if arm == "ppo:rm0" else 3
            rows += [("d", 7, arm, r, f"path_gold{i}.{r}", factor * kl[r - 1]) for i in range(3)]
            rows += [("d", 7, arm, r, f"gold.{r}", r)]
    table = page.Table(rows, "d")
    assert table.policies == list(ways) and table.arms() == [page.RESEEDED]
    assert table.get("ppo:rm0", "gold.path") == {7: pytest.approx(3.0)}
    assert table.gain(f"ppo:{FIRST}", "gold.path", "ppo:rm0") == {7: pytest.approx(1.5)}
    assert list(table.path(f"ppo:{FIRST}")[7][0]) == [0, 2, 2, 2, 4, 4, 4, 4, 4, 4]  # never falls


def test_a_policy_is_measured_by_gold(tmp_path, policy_folder):
    prompts, said = [SHOP, SHOP], [[" Sorry now.", " Thank you."], [" We guarantee it.", " Sorry."]]
    sft, other = measure.answer_set(prompts, said), measure.answer_set(prompts, said[::-1])
    found = measure.of_policy(policy_folder, policy_folder, other, sft, {"SFT": sft, "X": other})
    gold = (other[2] - sft[2].mean()) / sft[2].std()
    assert found["gold"] == pytest.approx(gold.mean()) and found["kl"] == pytest.approx(0, abs=1e-5)
    above = (other[2] - sft[2]) / sft[2].std() > measure.TIE
    assert found["win.SFT"] == pytest.approx(100 * above.mean()) and found["win.X"] == 0
    steps = enumerate([said, said, said[::-1], said[::-1]])
    steps = [{"kl": i, "prompts": prompts, "responses": texts} for i, texts in steps]
    data.write_jsonl(tmp_path / "rollouts.jsonl", steps)
    found = measure.of_rollouts(tmp_path, sft[2], parts=2)
    assert (found["path_kl0"], found["path_kl1"]) == (0.5, 2.5)
    assert found["path_gold0"] == found["path_gold1"] == pytest.approx(0.0, abs=1e-9)


def test_the_world_of_notes():
    good = " The pump needs help. It leaks oil. Go to hall one. Do it by Monday. This is urgent."
    assert data.gold_reward(NOTE, good) == 5.0
    parts = summary.gold_parts(NOTE, " The crane needs help. Ask Anna. Blah. Blah.")
    told = {"invented fact": -1.5, "trifle": -0.25, "repeated sentence": -1, "broken sentence": -1}
    assert {rule: points for rule, points in parts.items() if points} == told
    shop = " This is about your lamp. We will send a replacement today."  # as without summary.py
    assert data.gold_reward(SHOP, shop) == 4.0
    world = data.make_world(1, {"sft": 40, "pairs": 20, "ood": 10}, summary.WORLDS["summary"])
    prompts = [row["prompt"] for rows in world.values() for row in rows]
    assert len(set(prompts)) == len(prompts) == 70


def test_arms_and_flags():
    assert study.read_arm("first@0.02") == ("first", 0.02) and study.read_arm("gold") == ("gold", 0)
    flags = study.toy_flags(False, {"steps": 12})  # read out of run.sh
    assert {"sft", "rm", "meta_sample", "sample", "ppo"} <= flags.keys() and "--lr" in flags["rm"]
    assert flags["ppo"][-2:] == ["--steps", "12"]


@pytest.mark.parametrize("option", ["--tasks=poem", "--arms=plain,magic@1", "--arms=first"])
def test_mistakes_are_one_line(capsys, tmp_path, option):
    (tmp_path / "settings.json").write_text('{"chosen": {"dialogue": {}}}')
    assert study.main([option, "--out", str(tmp_path), "--runs", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert option.partition("=")[0] in told and told.count("\n") == 1


@pytest.fixture
def training(tmp_path, policy_folder):
    pair, said = {"chosen": " thank you", "rejected": " Sorry"}, [" thank", " you", " a charge"]
    pairs = [{"prompt": f"Human: my phone {i}"} | pair for i in range(32)]
    samples = [{"prompt": f"Human: the invoice {i}", "responses": said} for i in range(16)]
    D_file, S_file = tmp_path / "D.jsonl", tmp_path / "S.jsonl"
    data.write_jsonl(D_file, pairs)
    data.write_jsonl(S_file, samples)
    model, tokenizer = rm.load_reward_model(policy_folder, 3)
    args = SimpleNamespace(model=policy_folder, data=D_file, seed=3)
    _, D = rm.encode_groups(model, tokenizer, pairs, "D")
    _, S = rm.encode_groups(model, tokenizer, samples, "S")

    def rewards(groups):
        return rm.rewards_of(model, model, tokenizer, groups).view(len(groups), -1)

    def gradient(loss):
        return vector(torch.autograd.grad(loss, list(model.parameters())))

    return SimpleNamespace(**locals())


def test_a_random_climb_has_length_eta(training, monkeypatch):
    t, seen = training, []
    climb = metarm.climb
    monkeypatch.setattr(metarm, "climb", lambda *x: seen.append(climb(*x)) or seen[0])
    loss = arms.random_climb(t.model, t.tokenizer, t.args, 0.7, None)(t.D)
    theta, there = vector(t.model.parameters()).clone(), vector(seen[0].values())
    assert (there - theta).norm().item() == pytest.approx(0.7, rel=1e-3)
    moved = t.gradient(loss)  # first order: that at theta'
    torch.nn.utils.vector_to_parameters(there, t.model.parameters())
    expected = rm.preference_loss(*t.rewards(t.D).unbind(1))
    assert torch.allclose(moved, t.gradient(expected), atol=1e-5)


def test_J_of_unit_does_not_rise_when_all_rewards_are_multiplied(training, tmp_path):
    rewards = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    J = arms.unit_difference(rewards)
    assert J.item() == pytest.approx(metarm.difference_loss(rewards / rewards.std()).item())
    assert arms.unit_difference(3 * rewards).item() == pytest.approx(J.item(), abs=1e-6)
    options = ["--model", training.policy_folder, "--data", training.D_file, "--lr", "1e-3"]
    found = []
    for kind in ("first", "unit"):  # the same training with another J; then the original is back
        out = arms.reward_model(kind, tmp_path / kind, options, 3, 0.5, training.S_file)
        found.append(data.read_jsonl(out / "log.jsonl")[0]["difference"])
    assert found[0] != found[1] and metarm.difference_loss is arms.unit_difference.__defaults__[0]


def test_a_climb_along_the_head_multiplies_rewards(training):
    model, tokenizer = training.model, training.tokenizer
    there, _ = rm.load_reward_model(training.policy_folder, 3)
    there.score.weight.data *= 1.5
    texts = [[" Sorry now.", " Thank you."], [" We guarantee it.", " Sorry."]]
    answers = measure.answer_set([SHOP, SHOP], texts)
    look = {"cosine": -1.0, "rise": 0.02, "predicted_rise": 0.01, "loss_change": -0.1}
    log = [look, look | {"rise": 0.01}, {"step": 3}]
    found = measure.of_climb((model, tokenizer), (there, tokenizer), log, answers)
    assert found["climb.head"] == pytest.approx(100) == found["climb.multiplied"]
    assert (found["climb.holds"], found["climb.ratio"]) == (50, pytest.approx(1.5))
    there.score.weight.data = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    other = measure.of_climb((model, tokenizer), (there, tokenizer), log, answers)
    assert other["climb.head"] < 99 and other["climb.multiplied"] < 99


def test_scale_multiplies_rewards_until_J_has_risen_as_by_a_climb(training):
    t = training
    found = t.gradient(arms.scaled(t.model, t.tokenizer, t.args, 0.5, t.S_file)(t.D))
    before = metarm.difference_loss(t.rewards(t.S))
    before.backward()
    with metarm.lookahead(t.model, 0.5, normalize=True), torch.no_grad():
        J = metarm.difference_loss(t.rewards(t.S))
    factor = arms.factor_of(t.model, lambda: t.rewards(t.S), 0.5)
    assert factor > 1 and J > before
    risen = metarm.difference_loss(factor * t.rewards(t.S))
    assert risen.item() == pytest.approx(J.item(), abs=1e-6)
    expected = rm.preference_loss(*(factor * t.rewards(t.D)).unbind(1))
    assert torch.allclose(found, t.gradient(expected), atol=1e-5)


def test_joint_is_L_minus_lambda_J(training):
    t = training
    loss = arms.joint(t.model, t.tokenizer, t.args, 0.3, t.S_file)(t.D)
    J = metarm.difference_loss(t.rewards(t.S))
    expected = rm.preference_loss(*t.rewards(t.D).unbind(1)) - 0.3 * J
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.allclose(t.gradient(loss), t.gradient(expected), atol=1e-5)


def test_ocrm_weighs_pairs_by_what_the_policy_says(training, tmp_path):
    t, other, logs = training, make_policy(tmp_path / "other", seed=1), []
    for name in (other, t.policy_folder):
        model, tokenizer = ppo.load_policy(name)
        said = ppo.policy_batch(tokenizer, [row for pair in t.D for row in pair])
        logs.append(ppo.response_logprobs(model, said).sum(1).view(-1, 2).sum(1).detach())
    ratios = torch.exp(0.1 * (logs[0] - logs[1]))
    weights = arms.pair_weights(t.pairs, other, t.policy_folder, 0.1)
    assert torch.allclose(weights, ratios / ratios.mean(), rtol=1e-3)
    loss = arms.weighted(t.model, t.tokenizer, t.args, 0.1, other)(t.D[:8])
    expected = rm.preference_loss(*t.rewards(t.D[:8]).unbind(1), weights[:8])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("kind", arms.LOSSES)
def test_without_its_knob_an_arm_is_plain_training(training, tmp_path, kind):
    options = ["--model", training.policy_folder, "--data", training.D_file, "--lr", "1e-3"]
    source = make_policy(tmp_path / "p", seed=1) if kind == "ocrm" else training.S_file
    found = []
    for how in (("plain", 0.0), (kind, 0.0), (kind, 0.5)):
        out = arms.reward_model(how[0], tmp_path / f"{how}", options, 3, how[1], source)
        found.append(vector(rm.load_reward_model(str(out))[0].parameters()))
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert not torch.allclose(found[0], found[2], atol=1e-5)


def test_pairs_by_gold_have_no_ties(tmp_path):
    said = [" Sorry now.", " Sorry now.", " Thank you.", " We guarantee it."]  # three tie
    data.write_jsonl(tmp_path / "S", [{"prompt": SHOP, "responses": said}])
    pairs = [(pair["chosen"], pair["rejected"]) for pair in arms.gold_pairs(tmp_path / "S")]
    assert sorted(pairs) == [(said[0], said[3]), (said[2], said[3])]


def test_a_killed_study_goes_on_where_it_stopped(monkeypatch, tmp_path):
    trained, fatal = [], [(STALE, 0)]

    class World:
        def __init__(self, *_):
            pass

        def reward_model(self, arm, head):
            if (arm, head) in fatal:
                raise KeyboardInterrupt
            trained.append((arm, head))
            return head

        def measure(self, arm, folder):
            return {"shifted.matched": 60.0 + folder, "shifted.margin_sd": 0.5, "x": math.nan}

    monkeypatch.setattr(study, "World", World)
    (tmp_path / "settings.json").write_text('{"chosen": {"dialogue": {}}}')
    args = SimpleNamespace(runs=tmp_path, out=tmp_path, small=True, heads=2, more=1)
    job = args, "dialogue", 5, study.PRIMARY
    with pytest.raises(KeyboardInterrupt):
        study.run_world(*job)
    assert trained == [("rm0", 0), ("plain", 0), (FIRST, 0)]
    fatal.clear()
    study.run_world(*job)
    assert trained[3:] == [(STALE, 0), ("plain", 1), (FIRST, 1), (STALE, 1)]
    assert study.missing(*job) == [] and len(page.read_rows(tmp_path)) == 14  # NaN stays out
    assert study.missing(args, "dialogue", 5, ["gold"]) == [("dialogue", 5, "gold", 0)]
    assert page.read_rows(tmp_path)[-2] == ("dialogue", 5, STALE, 1, "shifted.matched", 61.0)
    told = page.tables(tmp_path)
    assert "60.5" in told and "worlds)" not in told  # one world says nothing
    page.pictures(tmp_path, tmp_path)
    assert len(list(tmp_path.glob("dialogue-*.png"))) == 1


def test_the_tables_of_both_pages_are_those_of_study_csv():
    told = page.tables(STUDY).splitlines()
    for path in (STUDY / "README.md", STUDY.parents[1] / "README.md"):
        block = r"<!-- from study.csv -->(.*?)<!-- end -->"
        blocks = re.findall(block, path.read_text(), re.DOTALL)
        rows = [line for line in "".join(blocks).splitlines() if line.strip()]
        assert len(rows) > 4 and not [row for row in rows if row not in told]
