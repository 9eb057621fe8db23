from functools import cache

import pytest
from conftest import TEXTS, byte_level_tokenizer, chat_tokenizer, llama_style_tokenizer
from datasets import Dataset

from hf_reflect import to_messages, to_pairs, to_prompt_completion, to_training_ids
from hf_reflect.templates import StudentTemplate

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
PROMPTS = {  # before the first turn only; before x; after x
    "vicuna": (VICUNA, "USER: ", " ASSISTANT:"),
    "alpaca": (
        "",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n",
        "\n\n### Response:",
    ),
    "wizardlm": ("", "", "\n\n### Response:"),
    "plain": ("", "", "\n"),
    "chat": ("", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
}
GUESS = (
    "Below is the response to an instruction, please guess the corresponding instruction for the given response.\n",
    "\nGenerate the instruction for the above response.",
)
STUDENTS = [
    ("byte-level", "vicuna"),
    ("byte-level", "alpaca"),
    ("byte-level", "wizardlm"),
    ("byte-level", "plain"),
    ("llama-style", "vicuna"),
    ("llama-style", "plain"),
    ("chat", "chat"),
    ("chat", "vicuna"),
]
HISTORY = [
    {"role": "user", "content": "Name a tall tree of the north."},
    {"role": "assistant", "content": "The spruce."},
    {"role": "user", "content": "And a small one?"},
    {"role": "assistant", "content": "**Dwarf birch**, ankle-high."},
]


@cache
def tokenizer_of(kind):
    makers = {"byte-level": byte_level_tokenizer, "llama-style": llama_style_tokenizer, "chat": chat_tokenizer}
    return makers[kind](TEXTS)


def naive_encoding(tokenizer, name, row, max_length=2048, reverse=False):
    """Context and target ids of a row by the definition; tokens are taken away one at a time."""
    x = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
    before, text, after, target = (GUESS[0], row["response"], GUESS[1], x) if reverse else ("", x, "", row["response"])
    target = tokenizer(target, add_special_tokens=False)["input_ids"]
    room = max_length - 1  # EOS has the last place
    least = min(len(target), max_length // 2)
    turns = list(row.get("history") or [])
    while True:
        context, cuttable = naive_context(tokenizer, name, turns, before, text, after)
        if len(context) <= room - least or not turns:
            break
        turns = turns[2:]
    while len(context) > room - least and cuttable:
        del context[cuttable.pop()]
    if len(context) >= room and len(context) + len(target) > room:
        raise ValueError("no room")
    return context, target[: room - len(context)]


def naive_context(tokenizer, name, turns, before, text, after):
    """The prompt's ids, and which of them lie in `text`."""
    opening, left, right = PROMPTS[name]
    context = []
    if name == "chat":  # one text, whose template trims every content
        opening = "".join(f"<|im_start|>{turn['role']}\n{turn['content'].strip()}<|im_end|>\n" for turn in turns)
        text = text if before else text.strip()
    else:
        for user, answer in zip(turns[::2], turns[1::2], strict=True):
            context += tokenizer(opening + left + user["content"] + right, add_special_tokens=not context)["input_ids"]
            context += tokenizer(answer["content"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            opening = ""
    start = len(opening + left + before)
    last = tokenizer(
        opening + left + before + text + after + right,
        add_special_tokens=name != "chat" and not context,
        return_offsets_mapping=True,
    )
    inside = [
        len(context) + place
        for place, (begin, end) in enumerate(last["offset_mapping"])
        if start <= begin < end <= start + len(text)
    ]
    return context + last["input_ids"], inside


def row_of(instruction, response, input="", history=()):
    return {"instruction": instruction, "input": input, "response": response, "history": list(history)}


def table_of(*rows):
    pairs = to_pairs(Dataset.from_list([{"instruction": "?", "output": "!"}] * len(rows)))
    fields = ("instruction", "input", "response", "history")
    return Dataset.from_list([{**pair, **{k: row[k] for k in fields}} for pair, row in zip(pairs, rows, strict=True)])


@pytest.mark.parametrize(("name", "expected"), [(name, "".join(parts)) for name, parts in PROMPTS.items()])
def test_a_prompt_is_its_template_to_the_character(name, expected):
    tokenizer = tokenizer_of("chat")
    opening, left, right = PROMPTS[name]
    context = StudentTemplate(tokenizer, name).forward(row_of("Add.", "25", "8 and 17")).context
    assert tokenizer.decode(context) == opening + left + "Add.\n8 and 17" + right
    assert tokenizer.decode(StudentTemplate(tokenizer, name).forward(row_of("", "")).context) == expected


@pytest.mark.parametrize("name", PROMPTS)
def test_the_reverse_question_takes_the_place_of_the_instruction(name):
    tokenizer = tokenizer_of("chat")
    opening, left, right = PROMPTS[name]
    context, target, _ = StudentTemplate(tokenizer, name).reverse(row_of("Add.", "It is 25.", "8 and 17"))
    assert tokenizer.decode(context) == opening + left + GUESS[0] + "It is 25." + GUESS[1] + right
    assert tokenizer.decode(target) == "Add.\n8 and 17"


@pytest.mark.parametrize(("kind", "name"), [("byte-level", "vicuna"), ("llama-style", "vicuna"), ("chat", "chat")])
def test_auto_is_the_chat_template_else_vicuna(kind, name):
    auto, named = (StudentTemplate(tokenizer_of(kind), template) for template in ("auto", name))
    row = row_of("Name a river.", "The Oder.", history=HISTORY)
    assert auto.name == name
    assert (auto.forward(row), auto.reverse(row)) == (named.forward(row), named.reverse(row))


def test_only_the_context_of_a_tokenizer_that_adds_bos_begins_with_it():
    llama, byte = tokenizer_of("llama-style"), tokenizer_of("byte-level")
    row = row_of("Name a river.", "The Oder.", history=HISTORY)
    assert StudentTemplate(llama).forward(row).context.count(llama.bos_token_id) == 1
    assert StudentTemplate(llama).forward(row).context[0] == llama.bos_token_id
    assert byte.bos_token_id not in StudentTemplate(byte).forward(row).context


def test_a_chat_template_that_writes_bos_is_not_given_another():
    tokenizer = llama_style_tokenizer(TEXTS)
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    context = StudentTemplate(tokenizer, "chat").forward(row_of("Name a river.", "The Oder.")).context
    assert context.count(tokenizer.bos_token_id) == 1
    assert context[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("kind", ["byte-level", "llama-style", "chat"])
def test_the_context_of_a_target_alone_is_bos_or_else_eos(kind):
    tokenizer = tokenizer_of(kind)
    special = tokenizer.eos_token_id if kind == "chat" else tokenizer.bos_token_id
    assert StudentTemplate(tokenizer).alone == [special]


@pytest.mark.parametrize("response", ["Plain words.", "**Bold** first", '"Quoted"', "\n\nLate", "```py\n1\n```", " x"])
@pytest.mark.parametrize(("kind", "name"), STUDENTS)
def test_training_ids_are_prompt_then_the_answer_by_itself_then_eos(kind, name, response):
    tokenizer = tokenizer_of(kind)
    row = row_of("Write a line", response, "about rain")
    (trained,) = to_training_ids(table_of(row), tokenizer, name)
    prompt, _ = naive_encoding(tokenizer, name, row)
    answer = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert trained["input_ids"] == prompt + answer
    assert trained["labels"] == [-100] * len(prompt) + answer


def test_tokenising_jointly_would_give_other_ids():
    # why targets are tokenised by themselves: without it the two tests of ids above would claim little
    tokenizer = tokenizer_of("llama-style")
    context, target, _ = StudentTemplate(tokenizer, "vicuna").forward(row_of("Name a river.", "The Oder."))
    assert context + target != tokenizer(f"{VICUNA}USER: Name a river. ASSISTANT:The Oder.")["input_ids"]


@pytest.mark.parametrize("max_length", [2048, 180])
@pytest.mark.parametrize(("kind", "name"), STUDENTS)
def test_training_ids_are_what_forward_gives(kind, name, max_length):
    tokenizer = tokenizer_of(kind)
    rows = [
        row_of("Write of rain. " * n, "**Rain** taps. " * (9 - n), history=HISTORY[: n // 3 * 2]) for n in range(1, 9)
    ]
    student = StudentTemplate(tokenizer, name, max_length)
    for row, trained in zip(rows, to_training_ids(table_of(*rows), tokenizer, name, max_length), strict=True):
        context, target, _ = student.forward(row)
        assert trained["input_ids"] == [*context, *target, tokenizer.eos_token_id]
        assert trained["labels"] == [-100] * len(context) + [*target, tokenizer.eos_token_id]


@pytest.mark.parametrize(("kind", "name"), STUDENTS)
def test_earlier_turns_stand_before_the_prompt_in_both_directions(kind, name):
    tokenizer = tokenizer_of(kind)
    row, student = row_of("Which is green?", "Both.", history=HISTORY), StudentTemplate(tokenizer, name)
    assert student.forward(row)[:2] == naive_encoding(tokenizer, name, row)
    assert student.reverse(row)[:2] == naive_encoding(tokenizer, name, row, reverse=True)


def test_vicuna_writes_its_system_sentence_once_and_eos_behind_each_answer():
    tokenizer = tokenizer_of("byte-level")
    context = StudentTemplate(tokenizer, "vicuna").forward(row_of("Which is green?", "Both.", history=HISTORY)).context
    assert tokenizer.decode(context) == (
        f"{VICUNA}USER: Name a tall tree of the north. ASSISTANT:The spruce.</s>"
        "USER: And a small one? ASSISTANT:**Dwarf birch**, ankle-high.</s>USER: Which is green? ASSISTANT:"
    )


def test_a_system_message_of_the_data_takes_the_place_of_the_templates():
    tokenizer = tokenizer_of("byte-level")
    history = [{"role": "system", "content": "Answer like a sailor."}, *HISTORY[:2]]
    context = StudentTemplate(tokenizer, "vicuna").forward(row_of("Why?", "Arr.", history=history)).context
    assert tokenizer.decode(context) == (
        "Answer like a sailor. USER: Name a tall tree of the north. ASSISTANT:The spruce.</s>USER: Why? ASSISTANT:"
    )


def overflowing():
    rain, quote = "Größe, rain and ü 😀. ", '"So," he said.\n'
    return {
        "long instruction": row_of(rain * 12, "Yes."),
        "long input": row_of("Shorten:", "Short.", quote * 12),
        "long response": row_of("Go on.", rain * 12),
        "both long": row_of(quote * 9, rain * 9, rain * 2),
        "history": row_of("Go on. " * 5, rain * 4, history=[*HISTORY, *HISTORY[:2]]),
    }


@pytest.mark.parametrize("case", overflowing())
@pytest.mark.parametrize(("kind", "name"), STUDENTS)
def test_what_does_not_fit_is_cut_as_defined_at_every_length(kind, name, case):
    tokenizer, row = tokenizer_of(kind), overflowing()[case]
    bare = max(
        len(naive_context(tokenizer, name, [], *parts)[0]) for parts in (("", "", ""), (GUESS[0], "", GUESS[1]))
    )
    whole = sum(map(len, naive_encoding(tokenizer, name, row, 10_000, reverse=True))) + 2
    for max_length in [*range(bare + 4, bare + 22), *range(bare + 22, whole + 40, 37), whole - 1, whole]:
        student = StudentTemplate(tokenizer, name, max_length)
        for reverse, (context, target, cut) in enumerate((student.forward(row), student.reverse(row))):
            assert (context, target) == naive_encoding(tokenizer, name, row, max_length, bool(reverse))
            assert 0 < len(target) <= max_length - 1 - len(context)
            assert cut == ((context, target) != naive_encoding(tokenizer, name, row, 10_000, bool(reverse)))


def test_the_context_gives_way_until_the_target_has_half():
    tokenizer = tokenizer_of("byte-level")
    context, target, cut = StudentTemplate(tokenizer, "plain", 101).forward(row_of("rain " * 300, "tap " * 300))
    assert (len(context), len(target), cut) == (50, 50, True)
    context, target, cut = StudentTemplate(tokenizer, "plain", 101).forward(row_of("rain " * 300, "Tap."))
    assert (len(context) + len(target), tokenizer.decode(target), cut) == (100, "Tap.", True)
    assert tokenizer.decode(context).endswith("\n"), "the template around the instruction stays"


def test_a_pair_that_just_fits_is_left_whole_and_one_token_less_cuts_the_instruction():
    tokenizer, row = tokenizer_of("byte-level"), row_of("Name a river of Poland.", "Oder.")
    context, target, _ = StudentTemplate(tokenizer, "vicuna").forward(row)
    fits = len(context) + len(target) + 1
    assert StudentTemplate(tokenizer, "vicuna", fits).forward(row) == (context, target, False)
    shorter = StudentTemplate(tokenizer, "vicuna", fits - 1).forward(row)
    assert (len(shorter.context), shorter.target, shorter.cut) == (len(context) - 1, target, True)


def test_the_oldest_turns_give_way_before_the_instruction_does():
    tokenizer, row = tokenizer_of("byte-level"), row_of("Which is green?", "Both.", history=HISTORY)
    whole = len(StudentTemplate(tokenizer, "plain").training_ids(row)["input_ids"])
    context, target, cut = StudentTemplate(tokenizer, "plain", whole - 1).forward(row)
    assert (tokenizer.decode(context), tokenizer.decode(target), cut) == (
        "And a small one?\n**Dwarf birch**, ankle-high.</s>Which is green?\n",
        "Both.",
        True,
    )
    assert len(row["history"]) == 4, "the row itself is left alone"


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_a_system_message_stays_when_turns_give_way(name):
    tokenizer = tokenizer_of("chat")
    row = row_of("Which is green?", "Both.", history=[{"role": "system", "content": "Be a sailor."}, *HISTORY])
    whole = len(StudentTemplate(tokenizer, name).training_ids(row)["input_ids"])
    expected = StudentTemplate(tokenizer, name).forward({**row, "history": [*row["history"][:1], *HISTORY[2:]]})
    assert StudentTemplate(tokenizer, name, whole - 1).forward(row)[:2] == expected[:2]


@pytest.mark.parametrize("name", ["vicuna", "alpaca", "wizardlm", "chat"])
def test_a_length_that_the_template_alone_fills_is_refused(name):
    tokenizer, row = tokenizer_of("chat"), row_of("Why?", "Because.")
    bare = len(naive_context(tokenizer, name, [], "", "", "")[0])
    with pytest.raises(ValueError, match=f"`max_length={bare + 1}` leaves no room.*{name}.*Raise `max_length`"):
        StudentTemplate(tokenizer, name, bare + 1).forward(row)
    with pytest.raises(ValueError, match="leaves no room"):
        to_training_ids(table_of(row), tokenizer, name, max_length=8)


WORDS = [
    "USER:",
    "ASSISTANT:",
    " ASSISTANT:",
    "user",
    "assistant",
    "### Response:",
    "\n",
    "Generate the instruction",
    "</s>",
]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(("kind", "name"), STUDENTS)
def test_words_of_the_template_in_the_texts_are_only_text(kind, name, word):
    tokenizer = tokenizer_of(kind)
    for row in (row_of(word, "Fine."), row_of(f"{word} says {word}", f"{word} rain {word} rain {word}" * 3)):
        bare = len(naive_context(tokenizer, name, [], GUESS[0], "", GUESS[1])[0])
        for max_length in (bare + 5, bare + 9, bare + 15, 2048):
            student = StudentTemplate(tokenizer, name, max_length)
            assert student.forward(row)[:2] == naive_encoding(tokenizer, name, row, max_length)
            assert student.reverse(row)[:2] == naive_encoding(tokenizer, name, row, max_length, reverse=True)


def test_a_slow_tokenizer_that_closes_its_texts_loses_only_the_targets_tail():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()  # one token a byte, EOS behind every text, no BOS, no offsets
    row = row_of("Name a river.", "The Oder flows north. " * 5)
    context, target, cut = StudentTemplate(tokenizer, "plain", 60).forward(row)
    assert (tokenizer.decode(context), cut) == ("Name a river.\n", True)
    assert target == tokenizer(row["response"], add_special_tokens=False)["input_ids"][: 59 - len(context)]


def test_unknown_templates_and_tokenizers_without_what_they_need_are_refused():
    with pytest.raises(ValueError, match="'vikuna'` is unknown; there are auto, chat, vicuna"):
        StudentTemplate(tokenizer_of("byte-level"), "vikuna")
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        StudentTemplate(tokenizer_of("byte-level"), "chat")
    tokenizer = byte_level_tokenizer(TEXTS)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token: set one"):
        StudentTemplate(tokenizer)


def mixed():
    """Four versions of which the second and the last are unusable, with columns of the user's own."""
    rows = [
        row_of("Why?", "Because.", history=HISTORY[:2]),
        row_of("Who?", None),
        row_of("Add.", "42", "17 and 25"),
        row_of(None, "I did."),
    ]
    return table_of(*rows).add_column("weight", [0.5, 1.5, 2.5, 3.5]).add_column("tags", [["a"], [], ["b", "c"], []])


@pytest.mark.parametrize(
    "convert", [lambda table: to_training_ids(table, tokenizer_of("chat")), to_messages, to_prompt_completion]
)
def test_unusable_rows_are_left_out_and_other_columns_kept(convert):
    table = mixed()
    out = convert(table)
    assert len(out) == 2
    for name in ("row_id", "variant", "source", "critique", "error", "weight", "tags"):
        assert out[name] == table.select([0, 2])[name]
        assert out.features[name] == table.features[name]


def test_training_ids_keep_the_text_columns():
    table = mixed()
    out = to_training_ids(table, tokenizer_of("byte-level"))
    assert out.column_names == [*table.column_names, "input_ids", "labels"]
    assert out.remove_columns(["input_ids", "labels"]).to_list() == table.select([0, 2]).to_list()


@pytest.mark.parametrize("convert", [to_messages, to_prompt_completion])
def test_formats_out_take_the_place_of_the_text_columns(convert):
    assert not {"instruction", "input", "response", "history"} & set(convert(mixed()).column_names)


def test_to_messages_gives_whole_conversations_without_template():
    assert to_messages(mixed())["messages"][:] == [
        [*HISTORY[:2], {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}],
        [{"role": "user", "content": "Add.\n17 and 25"}, {"role": "assistant", "content": "42"}],
    ]


SAID = [
    [{"role": "user", "content": "A river?"}, {"role": "assistant", "content": "The Po."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A tree?"},
        {"role": "assistant", "content": "Oak."},
        {"role": "user", "content": " Taller?\n"},
        {"role": "assistant", "content": "Fir."},
    ],
    HISTORY,
]


def as_sharegpt(turns):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]}


@pytest.mark.parametrize(
    "given",
    [
        lambda turns: {"messages": turns},
        as_sharegpt,
        lambda turns: {"prompt": turns[:-1], "completion": turns[-1:]},
    ],
    ids=["messages", "conversations", "prompt and completion"],
)
def test_conversations_come_back_whole(given):
    conversations = Dataset.from_list([{**given(turns), "n": n} for n, turns in enumerate(SAID)])
    out = to_messages(to_pairs(conversations))
    assert out["messages"][:] == SAID and out["n"][:] == [0, 1, 2]
    upto = [turns[: place + 1] for turns in SAID for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    assert to_messages(to_pairs(conversations, turns="all"))["messages"][:] == upto


@pytest.mark.parametrize("turns", ["last", "all"])
def test_a_rewritten_exchange_stands_at_the_end_of_its_conversation(turns):
    pairs = to_pairs(Dataset.from_list([{"messages": said} for said in SAID]), turns=turns)
    rewritten = pairs.map(lambda row: {"instruction": "Why?", "input": "now", "response": "So."})
    said = to_messages(pairs)["messages"]
    end = [{"role": "user", "content": "Why?\nnow"}, {"role": "assistant", "content": "So."}]
    assert to_messages(rewritten)["messages"][:] == [turns[:-2] + end for turns in said]


@pytest.mark.parametrize("name", ["vicuna", "alpaca", "wizardlm", "plain"])
def test_to_prompt_completion_writes_the_template_out(name):
    opening, left, right = PROMPTS[name]
    out = to_prompt_completion(mixed(), template=name)
    earlier = f"{opening}{left}Name a tall tree of the north.{right}The spruce.</s>"
    assert out["prompt"][:] == [f"{earlier}{left}Why?{right}", f"{opening}{left}Add.\n17 and 25{right}"]
    assert out["completion"][:] == ["Because.", "42"]


@pytest.mark.parametrize("name", ["vicuna", "alpaca", "wizardlm", "plain"])
def test_to_prompt_completion_writes_what_the_student_is_trained_on(name):
    system = [{"role": "system", "content": "Answer like a sailor."}]
    rows = [row_of("Why?", "Arr.", "now", history) for history in (system, HISTORY, system + HISTORY)]
    student = StudentTemplate(tokenizer_of("byte-level"), name)
    trained = [student.tokenizer.decode(student.forward(row).context) for row in rows]
    assert to_prompt_completion(table_of(*rows), name)["prompt"][:] == trained


def test_to_prompt_completion_is_vicuna_unless_told_and_knows_no_chat():
    assert to_prompt_completion(mixed())["prompt"][1] == f"{VICUNA}USER: Add.\n17 and 25 ASSISTANT:"
    with pytest.raises(ValueError, match="needs one of vicuna, alpaca, wizardlm, plain; for chat templates use"):
        to_prompt_completion(mixed(), template="chat")


@pytest.mark.parametrize(
    "convert", [lambda table: to_training_ids(table, tokenizer_of("byte-level")), to_messages, to_prompt_completion]
)
def test_a_table_that_cannot_be_converted_is_refused(convert):
    with pytest.raises(ValueError, match="no usable row among 1"):
        convert(mixed().select([1]))
    with pytest.raises(ValueError, match="needs the column 'response'"):
        convert(mixed().remove_columns("response"))


@pytest.mark.parametrize(
    ("convert", "column"),
    [(to_messages, "messages"), (to_prompt_completion, "prompt"), (to_prompt_completion, "completion")],
)
def test_formats_out_never_overwrite_a_column_of_the_user(convert, column):
    table = mixed()
    with pytest.raises(ValueError, match=f"'{column}', which is there already: rename or remove"):
        convert(table.add_column(column, ["mine"] * len(table)))


def test_a_table_without_history_or_input_text_converts_the_same():
    table = mixed().select([2])
    bare = table.remove_columns("history")
    assert to_messages(bare)["messages"][:] == to_messages(table)["messages"][:]
    tokenizer = tokenizer_of("llama-style")
    assert to_training_ids(bare, tokenizer)["input_ids"][:] == to_training_ids(table, tokenizer)["input_ids"][:]


def test_a_long_answer_to_an_empty_instruction_fits_too():
    tokenizer = tokenizer_of("byte-level")
    context, target, cut = StudentTemplate(tokenizer, "plain", 200).reverse(row_of("", "Rain taps. " * 60))
    assert (len(context), target, cut) == (199, [], True)
