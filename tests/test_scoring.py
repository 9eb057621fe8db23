import json
import math
import random
import re

import pytest
import torch
from conftest import TEXTS, byte_level_tokenizer, tiny_llama
from datasets import Dataset, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from test_templates import HISTORY, STUDENTS, naive_encoding, row_of, table_of, tokenizer_of

from hf_reflect import StudentScorer, to_training_ids
from hf_reflect.errors import SettingsError

LOSSES = ("loss_instruction", "loss_response", "loss_instruction_given_response", "loss_response_given_instruction")
SCORES = (*LOSSES, "ifd", "r_ifd")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # models this small only wait for each other's threads, long where the machine is busy
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def naive_loss(model, context, target):
    """Mean negative log-likelihood of the target, one token after the other."""
    with torch.no_grad():
        likely = model(torch.tensor([context + target])).logits[0].double().log_softmax(-1)
    return -sum(likely[len(context) - 1 + n, token].item() for n, token in enumerate(target)) / len(target)


def naive_scores(model, tokenizer, name, row, max_length=2048):
    alone = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    prompt, y = naive_encoding(tokenizer, name, row, max_length)
    reverse_prompt, x = naive_encoding(tokenizer, name, row, max_length, reverse=True)
    scores = {
        "loss_instruction": naive_loss(model, alone, x),
        "loss_response": naive_loss(model, alone, y),
        "loss_instruction_given_response": naive_loss(model, reverse_prompt, x),
        "loss_response_given_instruction": naive_loss(model, prompt, y),
    }
    scores["ifd"] = math.exp(scores["loss_response_given_instruction"]) / math.exp(scores["loss_response"])
    scores["r_ifd"] = math.exp(scores["loss_instruction_given_response"]) / math.exp(scores["loss_instruction"])
    return scores


def scores_of(table):
    return [{name: row[name] for name in SCORES} for row in table]


def assert_close(found, expected, rel=1e-5):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=rel)


VARIED = [
    row_of("Name three rivers of Europe.", "The Danube, the Rhine and the Loire."),
    row_of("Add the numbers.", "**42**", "17 and 25"),
    row_of("Which is green?", '"Both," I think.', history=HISTORY),
    row_of("Write a line about rain. " * 12, "Rain taps the roof. " * 3, "now"),
    row_of("Go on.", "Rain taps the roof like a patient visitor. " * 12, history=HISTORY[:2]),
    row_of("Why?", "Ü", history=HISTORY),
]


@pytest.mark.parametrize("max_length", [2048, 280])
@pytest.mark.parametrize(("kind", "name"), STUDENTS)
def test_all_six_numbers_are_those_of_the_plain_definition(kind, name, max_length):
    tokenizer = tokenizer_of(kind)
    model = tiny_llama(len(tokenizer))
    scorer = StudentScorer(model, tokenizer, name, max_length)
    scored = scorer.score(table_of(*VARIED))
    whole, fitting = (
        [[naive_encoding(tokenizer, name, row, length, way) for way in (False, True)] for row in VARIED]
        for length in (9999, max_length)
    )
    assert scorer.rows_cut == sum(one != other for one, other in zip(whole, fitting, strict=True))
    assert bool(scorer.rows_cut) == (max_length < 2048)
    assert_close(scores_of(scored), [naive_scores(model, tokenizer, name, row, max_length) for row in VARIED])


def test_scores_of_the_reference_rows_are_the_reference_scores(reference):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = reference / "models" / "tiny-student"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [json.loads(line) for line in (reference / "reference" / "scores.jsonl").read_text().splitlines()]
    texts = [{name: row[name] for name in ("instruction", "input", "response")} for row in expected]
    scored = StudentScorer(model, tokenizer, template="vicuna").score(Dataset.from_list(texts))
    assert len(scored) == 100
    for found, row in zip(scored, expected, strict=True):
        for name in LOSSES:
            assert found[name] == pytest.approx(row[name], abs=1e-4)
        for name in ("ifd", "r_ifd"):
            assert found[name] == pytest.approx(row[name], rel=1e-3)


@pytest.mark.parametrize("tokens", [1, 64, 4096, "auto"])
def test_scores_do_not_depend_on_how_rows_are_batched(student, pairs, tokens):
    single = StudentScorer(*student, tokens_per_batch=1)
    one_by_one = [single.score(pairs.select([n]))[0] for n in range(len(pairs))]
    assert_close(scores_of(StudentScorer(*student, tokens_per_batch=tokens).score(pairs)), scores_of(one_by_one), 1e-5)


def test_scores_do_not_depend_on_the_order_of_rows(student, pairs):
    table = concatenate_datasets([pairs, table_of(*VARIED)])
    order = random.Random(0).sample(range(len(table)), len(table))
    straight, shuffled = (StudentScorer(*student).score(rows) for rows in (table, table.select(order)))
    assert_close(scores_of(shuffled), [scores_of(straight)[n] for n in order], 1e-5)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_score_gives_what_map_gives_for_every_map_batch(student, candidates, size):
    scorer = StudentScorer(*student)
    mapped = candidates.map(scorer, batched=True, batch_size=size, load_from_cache_file=False)
    scored = scorer.score(candidates)
    assert mapped.features == scored.features
    assert mapped.column_names == scored.column_names == [*candidates.column_names, *SCORES]
    assert_close(scores_of(mapped), scores_of(scored), 1e-5)
    assert mapped.remove_columns(SCORES).to_list() == candidates.to_list()


def test_a_pack_holds_no_more_tokens_than_it_may_and_repeats_none(student, pairs):
    model, tokenizer = student
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda _, args, given: lengths.append(given["input_ids"].shape), with_kwargs=True
    )
    rows = concatenate_datasets([pairs, pairs])
    try:
        StudentScorer(model, tokenizer, tokens_per_batch=500).score(rows)
    finally:
        hook.remove()
    packs = [length for _, length in lengths]
    assert all(rows == 1 and length <= 500 for rows, length in lengths)
    assert max(packs) > 300
    template = StudentScorer(model, tokenizer).template
    encoded = [way(row) for row in pairs for way in (template.forward, template.reverse)]
    separate = sum(len(one.context) + 2 * len(one.target) + 1 for one in encoded)
    compared = 500 + 3 * 300  # some passages are scored in other company too, and three alone
    assert sum(packs) < 0.8 * separate + compared


@pytest.mark.parametrize("max_length", [2048, 280])
@pytest.mark.parametrize("kind", ["byte-level", "llama-style", "chat"])
def test_the_ids_that_are_trained_on_are_the_ids_that_were_scored(kind, max_length):
    tokenizer = tokenizer_of(kind)
    model, table = tiny_llama(len(tokenizer)), table_of(*VARIED)
    seen = []
    model.register_forward_pre_hook(lambda _, args, given: seen.extend(given["input_ids"].tolist()), with_kwargs=True)
    scorer = StudentScorer(model, tokenizer, max_length=max_length, tokens_per_batch=1)  # a pack is a sequence
    scorer.score(table)
    alone = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    for row in to_training_ids(table, tokenizer, max_length=max_length):
        target = [token for token in row["labels"] if token != -100]
        assert target.pop() == tokenizer.eos_token_id
        assert row["input_ids"][:-1] in seen
        assert alone + target in seen


def test_unusable_rows_are_null_and_stay(student):
    table = table_of(row_of("Why?", None), row_of("Why?", "Because."), row_of(None, "I did."), row_of(None, None))
    scored = StudentScorer(*student).score(table)
    assert [[row[name] is None for name in SCORES] for row in scored] == [
        [True] * 6,
        [False] * 6,
        [True] * 6,
        [True] * 6,
    ]
    assert scored.remove_columns(SCORES).to_list() == table.to_list()


def test_an_empty_answer_has_no_loss_but_its_instruction_has(student):
    (row,) = StudentScorer(*student).score(table_of(row_of("Why?", "")))
    missing = {"loss_response", "loss_response_given_instruction", "ifd"}
    assert {name for name in SCORES if row[name] is None} == missing


@pytest.mark.parametrize("how", ["map", "score"])
def test_columns_are_float64_even_where_the_first_batches_are_null(student, how):
    usable, unusable = row_of("Why?", "So."), row_of("Why?", None)
    table = Dataset.from_list([unusable] * 2400 + [usable] * 100)
    scorer = StudentScorer(*student, template="plain")
    scored = table.map(scorer, batched=True, load_from_cache_file=False) if how == "map" else scorer.score(table)
    assert {name: scored.features[name] for name in SCORES} == {name: Value("float64") for name in SCORES}
    for name in SCORES:
        assert [value is None for value in scored[name]] == [True] * 2400 + [False] * 100


@pytest.mark.parametrize("rows", [[], [row_of("Why?", None)]])
def test_a_table_with_nothing_to_score_has_the_columns_too(student, rows):
    table = table_of(row_of("Why?", "So."), *rows).select(list(range(1, 1 + len(rows))))
    scored = StudentScorer(*student).score(table)
    assert len(scored) == len(rows)
    assert {name: scored.features[name] for name in SCORES} == {name: Value("float64") for name in SCORES}


def test_columns_of_the_user_keep_their_values_and_types(student, pairs):
    table = pairs.add_column("weight", [0.5] * 8).add_column("tags", [["a", "b"], []] * 4)
    table = table.cast_column("weight", Value("float16"))
    for scored in (StudentScorer(*student).score(table), table.map(StudentScorer(*student), batched=True)):
        assert scored.remove_columns(SCORES).features == table.features
        assert scored.remove_columns(SCORES).to_list() == table.to_list()


@pytest.mark.parametrize("how", ["map", "score"])
def test_scoring_again_replaces_the_scores_of_another_student(student, pairs, how):
    other = StudentScorer(tiny_llama(len(student[1]), seed=1), student[1]).score(pairs)
    scorer = StudentScorer(*student)
    again = other.map(scorer, batched=True) if how == "map" else scorer.score(other)
    assert sorted(again.column_names) == sorted(other.column_names)
    assert_close(scores_of(again), scores_of(scorer.score(pairs)), 1e-5)


@pytest.mark.parametrize("missing", ["instruction", "input", "response"])
def test_a_missing_column_is_named(student, pairs, missing):
    with pytest.raises(ValueError, match=f"`StudentScorer` needs the column '{missing}'"):
        StudentScorer(*student).score(pairs.remove_columns(missing))


def test_a_table_without_history_scores_as_one_with_empty_history(student, pairs):
    scorer = StudentScorer(*student)
    assert scores_of(scorer.score(pairs.remove_columns("history"))) == scores_of(scorer.score(pairs))


def test_a_model_in_training_is_scored_without_dropout_and_left_as_it_was(student, pairs):
    model = tiny_llama(len(student[1]), attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    random.seed(0)
    states = torch.get_rng_state(), random.getstate()
    scored = StudentScorer(model, student[1]).score(pairs)
    assert_close(scores_of(scored), scores_of(StudentScorer(*student).score(pairs)), 1e-5)
    assert [module.training for module in model.modules()] == modes
    assert set(modes) == {True, False}
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_the_modes_come_back_after_an_error_too(student, pairs):
    model = tiny_llama(len(student[1])).train()

    def fail(*_):
        raise MemoryError("as on a full device")

    model.register_forward_pre_hook(fail)
    with pytest.raises(SettingsError, match=r"memory of cpu does not hold .* tokens. Lower `max_length`"):
        StudentScorer(model, student[1]).score(pairs)
    assert all(module.training for module in model.modules())


def not_causal():
    import transformers as hf

    bert = hf.BertConfig(
        vocab_size=305, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    t5 = hf.T5Config(vocab_size=305, d_model=32, num_layers=1, num_heads=2, d_ff=32, d_kv=16)
    llama = tiny_llama(305).config
    return [
        (hf.BertModel, bert),
        (hf.BertForMaskedLM, bert),
        (hf.T5ForConditionalGeneration, t5),
        (hf.T5EncoderModel, t5),
        (hf.LlamaModel, llama),
        (hf.LlamaForSequenceClassification, llama),
    ]


@pytest.mark.parametrize("number", range(6), ids=lambda number: not_causal()[number][0].__name__)
def test_a_model_that_is_no_causal_language_model_is_refused(student, number):
    kind, config = not_causal()[number]
    with pytest.raises(ValueError, match=f"must be a causal language model; {kind.__name__} is none"):
        StudentScorer(kind(config), student[1])


@pytest.mark.parametrize("tokens", [0, None, "many"])
def test_a_batch_size_that_is_none_is_refused(student, tokens):
    with pytest.raises(ValueError, match='`tokens_per_batch` is a number of tokens or "auto"'):
        StudentScorer(*student, tokens_per_batch=tokens)


def test_equal_students_hash_alike_for_the_cache_of_map(student):
    tokenizer = student[1]
    first, second = (Hasher.hash(StudentScorer(tiny_llama(len(tokenizer)), tokenizer)) for _ in range(2))
    assert first == second
    assert Hasher.hash(StudentScorer(tiny_llama(len(tokenizer)), tokenizer, tokens_per_batch=64)) == first


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.lm_head.weight[3, 4].add_(1e-3),
        lambda model: model.lm_head.weight[3, 4].neg_(),
        lambda model: model.lm_head.weight.neg_(),
        lambda model: model.lm_head.weight.copy_(model.lm_head.weight.flip(0)),
        lambda model: model.lm_head.weight.copy_(model.lm_head.weight.flip(1)),
        lambda model: model.model.norm.weight.mul_(2),
        lambda model: model.to(torch.bfloat16),
    ],
    ids=["one weight", "one sign", "all signs", "order of rows", "order of columns", "norm", "dtype"],
)
def test_the_hash_changes_with_the_weights(student, change):
    model, tokenizer = tiny_llama(len(student[1])), student[1]
    before = Hasher.hash(StudentScorer(model, tokenizer))
    with torch.no_grad():
        change(model)
    assert Hasher.hash(StudentScorer(model, tokenizer)) != before


@pytest.mark.parametrize("settings", [{"template": "plain"}, {"max_length": 100}, {"adapter": "base"}])
def test_the_hash_changes_with_what_scores_depend_on(student, settings):
    assert Hasher.hash(StudentScorer(*student, **settings)) != Hasher.hash(StudentScorer(*student))


def test_the_hash_does_not_change_with_what_changes_no_score(student):
    model, tokenizer = tiny_llama(len(student[1])), byte_level_tokenizer(TEXTS)
    before = Hasher.hash(StudentScorer(model, tokenizer))
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=5)
    model.config.use_cache = False
    assert Hasher.hash(StudentScorer(model, tokenizer)) == before


def test_the_hash_changes_with_the_strength_of_an_adapter(student):
    from peft import LoraConfig, get_peft_model

    hashes = set()
    for alpha in (8, 64):
        lora = LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(tiny_llama(len(student[1])), lora)
        for _, weights in model.named_parameters():
            torch.nn.init.ones_(weights)
        hashes.add(Hasher.hash(StudentScorer(model, student[1])))
        model.base_model.disable_adapter_layers()
        hashes.add(Hasher.hash(StudentScorer(model, student[1])))
    assert len(hashes) == 4


def test_the_hash_changes_with_the_tokenizer(student):
    model = student[0]
    hashes = {
        Hasher.hash(StudentScorer(model, tokenizer_of(kind), "plain"))
        for kind in ("byte-level", "llama-style", "chat")
    }
    assert len(hashes) == 3


def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(student, pairs, capsys, monkeypatch):
    scorer = StudentScorer(*student, tokens_per_batch=500)
    scorer.score(pairs)
    assert capsys.readouterr().err == ""  # no minute has passed
    monkeypatch.setattr("hf_reflect.scoring.processes._SAY_EVERY", 0.0)
    scorer.score(pairs)
    lines = capsys.readouterr().err.splitlines()
    form = r"Scoring: ([\d,]+) of ([\d,]+) tokens, [\d,]+ tokens/s, \d\d:\d\d left"
    said = [re.fullmatch(form, line).groups() for line in lines]
    assert len(said) > 3 and len({done for done, _ in said}) == len(said)
    assert said[-1][0] == said[-1][1]


def test_map_on_several_processes_is_refused_with_advice(student, pairs):
    with pytest.raises(
        ValueError, match=r"leave `num_proc` out of `map`.*accelerate launch.*scorer\.score\(dataset\)"
    ):
        pairs.map(StudentScorer(*student), batched=True, num_proc=2)


def test_a_loss_that_is_no_number_stops_the_scoring():
    tokenizer = byte_level_tokenizer(TEXTS)
    model = tiny_llama(len(tokenizer))
    table = Dataset.from_list([{"instruction": "Say hi.", "input": "", "response": "Hi."}])
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(SettingsError, match="no finite number"):
        StudentScorer(model, tokenizer).score(table)
