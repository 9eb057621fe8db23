import json
import pickle
import random
import re
import time

import dill
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_reflect import PROMPTS
from hf_reflect.errors import SettingsError
from hf_reflect.prompts import ReflectionPrompt, Rewrite

INSTRUCTION, RESPONSE = PROMPTS["instruction"], PROMPTS["response"]
REFLECTIONS = {name: prompt for name, prompt in PROMPTS.items() if isinstance(prompt, ReflectionPrompt)}
ERRORS = ("truncated: ", "refused: ", "unparsed: ", "placeholder: ")


# ---- what is asked


def test_instruction_prompt_is_the_papers_to_the_character():
    system, user = INSTRUCTION.chat("Name a river.", "The Rhine.")
    assert system == {
        "role": "system",
        "content": "You are a helpful, precise but picky assistant for checking the quality of a given instruction.",
    }
    assert user == {
        "role": "user",
        "content": """[Instruction]
Name a river.

[The Start of Answer]
The Rhine.
[The End of Answer]

We would like you to answer several questions related to the quality of a given instruction.

1. Why this instruction is not good? First analyze the instruction based on the Complexity of the Topic, Level of \
Detail Required, Knowledge Required, Ambiguity of the Instruction and Logical Reasoning or Problem-Solving Involved. \
Then analyze why this answer is not good for the given instruction based on the Helpfulness, Relevance, Accuracy and \
Level of Details. Finally, analyze why this bad instruction leads to a bad answer.

2. Based on the reason you provided, generate a new and complete instruction that is complex and difficult to \
answer directly. Make sure the new instruction is relevant but independent to the original instruction, which can be \
answered without knowing the original instruction, put the new instruction in the format of [New Instruction] your \
instruction [End]

3. Answer the newly generated instruction as detailed as possible, in the format of [New Answer] your answer [End]""",
    }


def test_response_prompt_is_the_papers_to_the_character():
    system, user = RESPONSE.chat("Name a river.", "The Rhine.")
    assert system == {
        "role": "system",
        "content": "You are a helpful, precise but picky assistant for checking the quality of the answer to a given "
        "instruction.",
    }
    assert user == {
        "role": "user",
        "content": """[Instruction]
Name a river.

[The Start of Answer]
The Rhine.
[The End of Answer]

We would like you to answer several questions related to the quality of the answer to the given instruction.

1. Why this answer is not good for the given instruction? Analyze based on the Helpfulness, Relevance, Accuracy and \
Level of Details.

2. Based on the reason you provided, generate a better answer, new and complete, as detailed as possible, in the \
format of [Better Answer] your answer [End]""",
    }


@pytest.mark.parametrize("part", ["instruction", "response"])
def test_input_and_history_have_blocks_of_their_own(part):
    history = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day.\nHow can I help?"}]
    plain = PROMPTS[part].chat("Translate.", "Bonjour.")[1]["content"]
    full = PROMPTS[part].chat("Translate.", "Bonjour.", input="Good\nmorning", history=history)[1]["content"]
    start = """[The Start of Conversation]
USER: Hello.
ASSISTANT: Good day.
How can I help?
[The End of Conversation]

[Instruction]
Translate.

[The Start of Input]
Good
morning
[The End of Input]

[The Start of Answer]
Bonjour.
[The End of Answer]

We would"""
    assert full.startswith(start)
    assert full.split("We would")[1] == plain.split("We would")[1]


@pytest.mark.parametrize("part", ["instruction", "response"])
def test_pairs_may_hold_braces_and_the_prompts_own_field_names(part):
    user = PROMPTS[part].chat("Fill {input} in {0}", "{response} {", input="{history}}")[1]["content"]
    assert "Fill {input} in {0}\n" in user and "\n{response} {\n" in user and "\n{history}}\n" in user


@pytest.mark.parametrize(
    "user",
    [
        "{instruction}{response}",
        "{{}} {instruction} {{response}} {response}{{",
        "{response:.3} {instruction:>9}",
        "{instruction!r} {response}",
    ],
)
def test_a_template_is_filled_as_str_format_does(user):
    prompt = ReflectionPrompt(system="", user=user, tags=("Better",))
    pair = {"instruction": "Fill {0}.", "response": "{{Done}}: {instruction}"}
    assert prompt.chat(**pair)[1]["content"] == user.format(**pair)


def test_own_prompt_brings_its_criteria_and_tag():
    prompt = ReflectionPrompt(
        system="Be brief.",
        user="{instruction}|{response}|{response_criteria}|{instruction_criteria}",
        tags=("Shorter",),
        instruction_criteria=("Clarity", "Depth"),
        response_criteria=("Brevity",),
    )
    assert prompt.chat("a", "b")[1]["content"] == "a|b|Brevity|Clarity and Depth"
    assert prompt.parse("Too long. [Shorter] Rain. [End]").response == "Rain."


def test_lists_do_for_tuples_and_criteria_may_be_none():
    prompt = ReflectionPrompt(
        system="",
        user="{instruction}{response}{instruction_criteria}|{response_criteria}",
        tags=["Better"],
        instruction_criteria=["Clarity", "Depth", "Length"],
        response_criteria=[],
    )
    assert prompt.chat("", "")[1]["content"] == "Clarity, Depth and Length|"
    assert hash(prompt) and prompt.parse("[Better] Rain. [End]").response == "Rain."


# ---- how a reply is read

A = "Water boils at 100 °C at sea level; higher up it boils earlier, since the air presses less."
CODE = 'Read lines:\n\n```python\nfor line in file:\n    if line == "[End]":\n        break\n```\n\nThat is all.'

GOOD_ANSWERS = {
    "as asked": (f"It is thin.\n\n[Better Answer] {A} [End]", A),
    "tag on its own line": (f"It is thin.\n\n[Better Answer]\n{A}\n[End]\n", A),
    "no critique": (f"[Better Answer] {A} [End]", A),
    "lower case": (f"It is thin.\n[better answer] {A} [end]", A),
    "upper case": (f"It is thin.\n[BETTER ANSWER] {A} [END]", A),
    "bold": (f"It is thin.\n\n**[Better Answer]** {A} **[End]**", A),
    "bold with a colon inside": (f"It is thin.\n\n**[Better Answer]:** {A} [End]", A),
    "bold with a colon after": (f"It is thin.\n\n**[Better Answer]**: {A} [End]", A),
    "bold italics": (f"It is thin.\n\n***[Better Answer]***\n\n{A}\n\n***[End]***", A),
    "underscores": (f"It is thin.\n\n__[Better Answer]__ {A} __[End]__", A),
    "heading": (f"## Critique\nIt is thin.\n\n## [Better Answer]\n\n{A}\n\n## [End]", A),
    "heading, bold, colon": (f"It is thin.\n\n### **[Better Answer]:**\n{A}\n[End]", A),
    "colon": (f"It is thin.\n\n[Better Answer]: {A} [End]", A),
    "full-width colon": ("[Better Answer]：水在一百度沸腾。[End]", "水在一百度沸腾。"),
    "number": (f"1. It is thin.\n\n2. [Better Answer] {A} [End]", A),
    "number and bold": (f"1. It is thin.\n\n2) **[Better Answer]** {A} [End]", A),
    "bold number": (f"1. It is thin.\n\n**2. [Better Answer]** {A} [End]", A),
    "bullet": (f"- It is thin.\n- [Better Answer] {A} [End]", A),
    "quoted line": (f"It is thin.\n\n> [Better Answer] {A} [End]", A),
    "spaces in the tag": (f"It is thin.\n\n[ Better  Answer ] {A} [ End ]", A),
    "tag amid the only line": (f"It is thin, so here it is: [Better Answer] {A} [End]", A),
    "no end": (f"It is thin.\n\n[Better Answer] {A}", A),
    "slash end": (f"It is thin.\n\n[Better Answer] {A} [/End]", A),
    "end of answer": (f"It is thin.\n\n[Better Answer] {A} [End of Answer]", A),
    "the end of answer, as the prompt has it": (f"It is thin.\n\n[Better Answer]\n{A}\n[The End of Answer]", A),
    "end twice": (f"It is thin.\n\n[Better Answer] {A} [End]\n\n[End]", A),
    "tag in the critique": (f"A [Better Answer] would name the height.\n\n[Better Answer] {A} [End]", A),
    "both tags in the critique": (
        f"I put it in the format of [Better Answer] your answer [End].\n\n[Better Answer] {A} [End]",
        A,
    ),
    "words with end": ("[Better Answer] Endings end in the End. Endless! [End]", "Endings end in the End. Endless!"),
    "words with end, no end": ("[Better Answer] The End\nEndive is a leaf.", "The End\nEndive is a leaf."),
    "other words in brackets": (
        "[Better Answer] Use [Endpoint], arr[end] = 1 and [Ending]. [End]",
        "Use [Endpoint], arr[end] = 1 and [Ending].",
    ),
    "end amid a sentence": (
        "[Better Answer] Write [End] on the last card. Then shuffle. [End]",
        "Write [End] on the last card. Then shuffle.",
    ),
    "end in a code block": (f"[Better Answer] {CODE} [End]", CODE),
    "end in a code block, no end": (f"[Better Answer] {CODE}", CODE),
    "whole answer a code block": ("[Better Answer]\n```sh\nls -l\n```\n[End]", "```sh\nls -l\n```"),
    "three backticks in a sentence": ("[Better Answer] Put ``` above the code. [End]", "Put ``` above the code."),
    "code block that nobody closed": ("[Better Answer]\n```sh\nls -l\n[End]", "```sh\nls -l"),
    "tag quoted in the answer": (
        "[Better Answer]\nTeachers write:\n```\n[Better Answer] text [End]\n```\nand mostly comply. [End]",
        "Teachers write:\n```\n[Better Answer] text [End]\n```\nand mostly comply.",
    ),
    "N/A in a table": (
        "[Better Answer] | city | tram |\n|---|---|\n| Ulm | yes |\n| Hof | N/A |\n[End]",
        "| city | tram |\n|---|---|\n| Ulm | yes |\n| Hof | N/A |",
    ),
    "your answer in a text": (
        "[Better Answer] Check your answer: 6 × 7 = 42. [End]",
        "Check your answer: 6 × 7 = 42.",
    ),
    "short": ("[Better Answer] 42 [End]", "42"),
    "begins in bold": ("[Better Answer] **Boiling.** It needs heat. [End]", "**Boiling.** It needs heat."),
    "begins with a list": ("[Better Answer]\n1. Heat it.\n2. Wait.\n[End]", "1. Heat it.\n2. Wait."),
    "begins with a heading": ("[Better Answer]\n# Boiling\nHeat it.\n[End]", "# Boiling\nHeat it."),
    "ends in bold": ("[Better Answer] It needs **heat** [End]", "It needs **heat**"),
    "quotation marks": ('[Better Answer] "Boil!" said the cook. [End]', '"Boil!" said the cook.'),
    "blank lines inside": ("[Better Answer] One.\n\n\n  Two.\n[End]", "One.\n\n\n  Two."),
    "thinking": (
        f"<think>\nFirst a draft:\n[Better Answer] Draft. [End]\n</think>\n\nIt is thin.\n\n[Better Answer] {A} [End]",
        A,
    ),
    "thinking whose beginning the chat template kept": (
        f"First a draft:\n[Better Answer] Draft. [End]\n</think>\n\nIt is thin.\n\n[Better Answer] {A} [End]",
        A,
    ),
    "think tags in the answer": (
        "[Better Answer] Such models write <think>aloud</think> first. [End]",
        "Such models write <think>aloud</think> first.",
    ),
    "CRLF": ("It is thin.\r\n\r\n[Better Answer]\r\nOne.\r\nTwo.\r\n[End]\r\n", "One.\nTwo."),
    "German": ("Zu knapp.\n\n[Better Answer] Am Ende siedet Wasser. [End]", "Am Ende siedet Wasser."),
    "Arabic": ("[Better Answer] يغلي الماء عند مئة درجة. [End]", "يغلي الماء عند مئة درجة."),
    "Japanese": ("短すぎる。\n[Better Answer]\n水は百度で沸騰する。\n[End]", "水は百度で沸騰する。"),
    "sign-off": (f"[Better Answer] {A} [End]\n\nI hope this is of use! Tell me if not.", A),
    "sign-off in bold": (f"[Better Answer] {A}\n**[End]**\n\n**Note:** checked twice.", A),
}


@pytest.mark.parametrize(("reply", "answer"), GOOD_ANSWERS.values(), ids=GOOD_ANSWERS)
def test_better_answer_is_read_to_the_character(reply, answer):
    rewrite = RESPONSE.parse(reply)
    assert (rewrite.instruction, rewrite.response, rewrite.error) == (None, answer, None)


PREAMBLES = [
    "Here is a new and more detailed answer:",
    "Here's a better and more complete answer:",
    "Here is an improved answer to the given instruction:",
    "Below is a more detailed, accurate and helpful response:",
    "Sure! Here is a better answer:",
    "**Here is the revised answer:**",
    "Here is an improved version of the answer:",
    "Better answer:",
]


@pytest.mark.parametrize("space", [" ", "\n\n"])
@pytest.mark.parametrize("preamble", PREAMBLES)
def test_preamble_of_the_teacher_is_not_the_answer(preamble, space):
    assert RESPONSE.parse(f"[Better Answer] {preamble}{space}{A} [End]").response == A


def test_preamble_and_nothing_else_is_no_answer():
    rewrite = RESPONSE.parse("Thin.\n[Better Answer] Here is a new and more detailed answer: [End]")
    assert rewrite.response is None and rewrite.error


@pytest.mark.parametrize(
    "answer",
    [
        "Here are three rivers: the Po, the Oder and the Tagus.",
        "Here is a haiku:\n\nOld pond\nA frog leaps in\nThe sound of water",
        "Here is the Python function:\n\n```python\ndef f(): ...\n```",
        "Here is a detailed comparison of tea and coffee: tea steeps, coffee drips.",
        "Here is a more detailed plan: rise, run, rest.",
        "Here is a new answer to an old riddle: silence.",
        "Here is a polite response to the customer: Dear Ms Ono, thank you.",
        "Here is a new and exciting recipe: toast.",
        "Sure! Here is a limerick:\n\nThere once was a lamp",
        "Sure, tides follow the moon.",
        "This is a better world: no wasps.",
        "A better answer: silence, said the monk, and it was no joke to his pupils.",
    ],
)
def test_answer_that_rightly_begins_with_here_stays_whole(answer):
    assert RESPONSE.parse(f"Thin.\n\n[Better Answer] {answer} [End]").response == answer


Q = "Explain, with one sketch of a proof, why there is no largest prime."
GOOD_PAIRS = {
    "as asked": f"Vague.\n\n[New Instruction] {Q} [End]\n\n[New Answer] {A} [End]",
    "numbered": f"1. Vague.\n\n2. [New Instruction] {Q} [End]\n\n3. [New Answer] {A} [End]",
    "numbered, no ends": f"1. Vague.\n\n2. [New Instruction] {Q}\n\n3. [New Answer] {A}",
    "no end between": f"Vague.\n\n[New Instruction] {Q}\n\n[New Answer] {A} [End]",
    "one line": f"Vague. [New Instruction] {Q} [End] [New Answer] {A} [End]",
    "bold": f"Vague.\n\n**[New Instruction]**\n\n{Q}\n\n**[End]**\n\n**[New Answer]**\n\n{A}\n\n**[End]**",
    "bold, no ends": f"Vague.\n\n**[New Instruction]:** {Q}\n\n**[New Answer]:** {A}",
    "headings": f"### 1. Analysis\nVague.\n\n### 2. [New Instruction]\n{Q}\n[End]\n\n### 3. [New Answer]\n{A}\n[End]",
    "titles above the tags": (
        f"**1. Why**\nVague.\n\n**2. New**\n[New Instruction] {Q} [End]\n\n**3. Answer**\n[New Answer] {A} [End]"
    ),
    "other case": f"Vague.\n[NEW INSTRUCTION] {Q} [END]\n[new answer] {A} [end]",
    "both named in the critique": (
        f"My [New Instruction] asks for a proof, and my [New Answer] gives it.\n\n"
        f"[New Instruction] {Q} [End]\n\n[New Answer] {A} [End]"
    ),
    "the format repeated": (
        "I use the format of [New Instruction] your instruction [End] and [New Answer] your answer [End].\n\n"
        f"[New Instruction] {Q} [End]\n\n[New Answer] {A} [End]"
    ),
    "preambles": (
        f"Vague.\n\n[New Instruction] Here is a new and more complex instruction: {Q} [End]\n\n"
        f"[New Answer] Here is a detailed answer to the new instruction:\n\n{A} [End]"
    ),
    "thinking": (
        f"<think>[New Instruction] draft [End]\n[New Answer] draft [End]</think>\n"
        f"[New Instruction] {Q} [End]\n[New Answer] {A} [End]"
    ),
    "sign-off": f"Vague.\n[New Instruction] {Q} [End]\nOn to the answer.\n[New Answer] {A} [End]\nAll done.",
    "CRLF": f"Vague.\r\n\r\n[New Instruction] {Q} [End]\r\n\r\n[New Answer] {A} [End]\r\n",
}


@pytest.mark.parametrize("reply", GOOD_PAIRS.values(), ids=GOOD_PAIRS)
def test_new_instruction_comes_with_the_answer_to_it(reply):
    rewrite = INSTRUCTION.parse(reply)
    assert (rewrite.instruction, rewrite.response, rewrite.error) == (Q, A, None)


UNUSABLE = {
    "empty": (RESPONSE, "", "unparsed"),
    "white space": (RESPONSE, " \r\n\t\n", "unparsed"),
    "no tag": (RESPONSE, "The answer is good as it is; nothing needs to change.", "unparsed"),
    "end alone": (RESPONSE, "Thin. [End]", "unparsed"),
    "translated tag": (RESPONSE, "[Bessere Antwort] Wasser siedet. [Ende]", "unparsed"),
    "nothing behind the tag": (RESPONSE, "Thin.\n\n[Better Answer]", "unparsed"),
    "nothing before the end": (RESPONSE, "Thin.\n\n[Better Answer] [End]", "unparsed"),
    "instruction without its answer": (INSTRUCTION, f"Vague.\n[New Instruction] {Q} [End]", "unparsed"),
    "answer without its instruction": (INSTRUCTION, f"Vague.\n[New Answer] {A} [End]", "unparsed"),
    "empty answer": (INSTRUCTION, f"[New Instruction] {Q} [End]\n[New Answer] [End]", "unparsed"),
    "empty instruction": (INSTRUCTION, f"[New Instruction] [End]\n[New Answer] {A} [End]", "unparsed"),
    "only thoughts": (RESPONSE, "<think>[Better Answer] Draft. [End]</think>", "unparsed"),
    "thoughts without end": (RESPONSE, "<think>\n[Better Answer] Draft. [End]\nBut wait", "unparsed"),
    "your answer": (RESPONSE, "Thin.\n[Better Answer] your answer [End]", "placeholder"),
    "your answer in brackets": (RESPONSE, "Thin.\n[Better Answer] [Your answer] [End]", "placeholder"),
    "your better answer here": (RESPONSE, "[Better Answer] <your better answer here> [End]", "placeholder"),
    "dots": (RESPONSE, "Thin.\n[Better Answer] ... [End]", "placeholder"),
    "N/A": (RESPONSE, "Thin.\n[Better Answer] N/A [End]", "placeholder"),
    "N/A with a stop": (RESPONSE, "Thin.\n[Better Answer] **N/A.** [End]", "placeholder"),
    "instruction N/A": (INSTRUCTION, f"[New Instruction] N/A [End]\n[New Answer] {A} [End]", "placeholder"),
    "the format": (
        INSTRUCTION,
        "[New Instruction] your instruction [End]\n[New Answer] your answer [End]",
        "placeholder",
    ),
    "sorry": (RESPONSE, "I'm sorry, but I can't assist with that request.", "refused"),
    "curly sorry": (RESPONSE, "I’m sorry, but I can’t help with that.", "refused"),
    "apology": (INSTRUCTION, "I apologize, but I cannot fulfill this request.", "refused"),
    "as an AI": (RESPONSE, "As an AI language model, I cannot provide such content.", "refused"),
    "unable": (RESPONSE, "Unfortunately, I am unable to help with this.", "refused"),
    "sorry in the tags": (
        RESPONSE,
        "It is harmful.\n[Better Answer] I'm sorry, but I cannot help with that. [End]",
        "refused",
    ),
    "instruction kept, answer refused": (
        INSTRUCTION,
        "Vague.\n[New Instruction] Pick a lock. [End]\n[New Answer] I’m sorry, I can’t assist with that. [End]",
        "refused",
    ),
}


@pytest.mark.parametrize(("prompt", "reply", "code"), UNUSABLE.values(), ids=UNUSABLE)
def test_reply_without_a_rewrite_is_refused_whole_with_its_reason(prompt, reply, code):
    rewrite = prompt.parse(reply)
    assert rewrite.instruction is None and rewrite.response is None
    assert rewrite.error.startswith(f"{code}: ")
    assert "\n" not in rewrite.error and len(rewrite.error) < 250


@pytest.mark.parametrize(
    "answer",
    [
        "I can't help but smile when the first rain falls on the dust.",
        "I'm sorry to hear about your cat. Talk to friends, and give it time.",
        "Unfortunately, the match was lost in the last minute.",
        "I cannot remember a colder winter, wrote the miller in his diary.",
        "Dear Ms Ono, I am unable to attend on Friday. Would Monday suit you?",
        "As an AI researcher, I read many papers a week.",
    ],
)
def test_answer_that_only_sounds_like_a_refusal_stays(answer):
    assert RESPONSE.parse(f"Thin.\n[Better Answer] {answer} [End]").response == answer


@pytest.mark.parametrize(
    "reply",
    [
        "Thin.\n\n[Better Answer] Water boils at a hund",
        "It is thin, since the heig",
        "",
        "[Better Answer] Use `[End]` at the end, and then contin",
    ],
)
def test_cut_off_reply_is_never_kept(reply):
    rewrite = RESPONSE.parse(reply, "length")
    assert rewrite.error.startswith("truncated: ") and rewrite.response is None


def test_cut_off_answer_takes_its_instruction_along():
    rewrite = INSTRUCTION.parse(f"Vague.\n[New Instruction] {Q} [End]\n[New Answer] Suppose there w", "length")
    assert rewrite.error.startswith("truncated: ") and rewrite.instruction is None and rewrite.response is None


@pytest.mark.parametrize("reply", ["", "Thin.\n[Better Answer] Water bo"])
def test_filtered_reply_counts_as_refused(reply):
    rewrite = RESPONSE.parse(reply, "content_filter")
    assert rewrite.error.startswith("refused: ") and rewrite.response is None


def test_endpoint_that_names_no_finish_reason_is_read_all_the_same():
    assert RESPONSE.parse(f"[Better Answer] {A} [End]", None).response == A


@pytest.mark.parametrize(
    ("reply", "critique"),
    [
        (f"It is thin.\n\nIt names no height.\n\n[Better Answer] {A} [End]", "It is thin.\n\nIt names no height."),
        (f"1. It is thin.\n\n2. **[Better Answer]** {A} [End]", "1. It is thin."),
        (f"It is thin.\n\n### [Better Answer]\n{A}", "It is thin."),
        (f"A [Better Answer] names the height.\n\n[Better Answer] {A}", "A [Better Answer] names the height."),
        (f"<think>Hm.</think>\n\nIt is thin.\n[Better Answer] {A} [End]", "It is thin."),
        (f"<think>Hm.</think>\n\n[Better Answer] {A} [End]", None),
        (f"[Better Answer] {A} [End] The old answer was thin.", None),
        ("It is thin.\n[Better Answer] your answer [End]", "It is thin."),
        ("It is thin.\n[Better Answer] [End]", "It is thin."),
        ("It is harmful.\n[Better Answer] I'm sorry, I cannot help with that. [End]", "It is harmful."),
    ],
)
def test_critique_is_what_the_teacher_said_before_it_rewrote(reply, critique):
    assert RESPONSE.parse(reply).critique == critique


@pytest.mark.parametrize(
    ("reply", "choices"),
    [
        ("[Better Answer] your answer [End]\n\n[Better Answer] Heat it. [End]", {"Heat it."}),
        ("[Better Answer] Heat it. [End]\n\n[Better Answer] Boil it. [End]", {"Heat it.", "Boil it."}),
        ("[Better Answer]\n\n[Better Answer] Heat it. [End]", {"Heat it."}),
        ("[Better Answer] Heat it. [End]\nThe [End] stands where you wanted it.", {"Heat it."}),
    ],
)
def test_doubtful_reply_gives_one_clean_answer_or_none(reply, choices):
    assert RESPONSE.parse(reply).response in {None, *choices}


WRAPPINGS = [
    "{}",
    "[Better Answer] {} [End]",
    "Thin.\n\n[Better Answer]\n{}\n[End]\n",
    "1. Thin.\n\n2. **[Better Answer]:**\n\n{}\n\n**[End]**\n\nBest wishes!",
    "<think>\n[Better Answer] no [End]\n</think>## [better answer]\n{}[end]",
]
PIECES = [
    *(
        "[Better Answer]",
        "[New Instruction]",
        "[New Answer]",
        "[End]",
        "[end of file]",
        "Endive",
        "**",
        "#",
        "> ",
        "`",
    ),
    *(
        "```",
        "\n",
        "\n\n",
        "\r\n",
        "  ",
        "1. ",
        "- ",
        "N/A",
        "your answer",
        "I'm sorry, but I can't ",
        "help",
        "ß",
        "水",
    ),
    *("Here is a ", "better answer:", "Sure! ", "<think>", "</think>", "]", "[", ":", "\x00", "\ud800", "rain", "{}"),
]


def test_any_reply_gives_a_piece_of_itself_or_one_reason():
    chance = random.Random(11)
    for _ in range(4000):
        body = "".join(chance.choices(PIECES, k=chance.randrange(12)))
        reply = chance.choice(WRAPPINGS).replace("{}", body)
        prompt = chance.choice([INSTRUCTION, RESPONSE])
        rewrite = prompt.parse(reply, chance.choice(["stop", "stop", "stop", None, "length", "tool_calls"]))
        if rewrite.error is None:
            assert (rewrite.instruction is None) == (prompt is RESPONSE)
            for text in (rewrite.response, rewrite.instruction or rewrite.response):
                assert text and text == text.strip() and text in reply.replace("\r\n", "\n")
        else:
            assert rewrite.error.startswith(ERRORS)
            assert rewrite.instruction is None and rewrite.response is None


HOSTILE = [
    *(
        "[",
        "]",
        "*",
        "_",
        "#",
        " ",
        "\t",
        "\n",
        "\r\n",
        "`",
        "> ",
        "1. ",
        "- ",
        "[ ",
        "[ /",
        "[End",
        "[End of ",
        "[End]",
    ),
    *("```", "```[End]", "**[End]", "# * _ > ", "\n ", "\n# ", "\n1.", "\n* ", "<think>", "</think>", "<think> "),
    *("[Better", "[Better ", "[Better Answer", "[Better Answer]", "[Better Answer]\n", "\n[Better Answer] [End]"),
    *(
        "[New Instruction]",
        "\n[New Instruction]\n[New Answer]",
        "[New Answer][New Instruction]\n",
        "Here is a ",
        "new ",
    ),
    *(
        "new and more ",
        "more, ",
        "Sure! ",
        "I'm sorry, ",
        "I can't ",
        "as an ai ",
        "very ",
        "N/A ",
        "_ your ",
        "ß",
        "水",
    ),
]


@pytest.mark.parametrize(
    "start",
    ["", "[Better Answer] ", "[New Instruction] x [New Answer] ", "[Better Answer] Here is a ", "[", "[Better"],
)
@pytest.mark.parametrize("end", ["", " Answer] x [End]", "\n[New Instruction] x\n[New Answer] x"])
def test_hostile_reply_of_100_kb_is_read_at_once(start, end):
    for unit in HOSTILE:
        reply = start + unit * (100_000 // len(unit)) + end
        for prompt in (INSTRUCTION, RESPONSE):
            rewrite = prompt.parse(reply)
            assert (rewrite.response is None) == (rewrite.error is not None)


# ---- further replies, in the manner of many models; what a careful reader takes of each, None where that is nothing

MORE_ANSWERS = {
    "title in bold": (f"It is thin.\n\n**Better Answer:** {A}", A),
    "title in bold, own line": (f"It is thin.\n\n**Better Answer**\n\n{A}\n\n**End**", A),
    "heading": (f"## Critique\nIt is thin.\n\n## Better Answer\n\n{A}", A),
    "numbered heading": (f"### 1. Analysis\nIt is thin.\n\n### 2. Better Answer:\n{A}\n[End]", A),
    "plain title": (f"It is thin.\n\nBetter Answer: {A}\n", A),
    "angle": (f"It is thin.\n\n<Better Answer>\n{A}\n</Better Answer>", A),
    "better answer in prose only": ("A better answer would name the height. I see no reason to write one.", None),
    "fenced whole": (f"```\nIt is thin.\n\n[Better Answer] {A} [End]\n```", A),
    "fenced whole md no end": (f"```markdown\nIt is thin.\n\n[Better Answer]\n{A}\n```", A),
    "fenced with code inside": (f"```markdown\nThin.\n\n[Better Answer]\n{CODE}\n[End]\n```", CODE),
    "section fenced tags": (f"It is thin.\n\n```\n[Better Answer]\n{A}\n[End]\n```\n", A),
    "bom": (f"\ufeff[Better Answer] {A} [End]", A),
    "zero width in tag": (f"It is thin.\n\n[\u200bBetter Answer\u200b]\u200b {A} [\u200bEnd]", A),
    "nbsp": (f"It is thin.\n\n[Better\xa0Answer]\xa0{A}\xa0[End]", A),
    "zwsp before tag": (f"It is thin.\n\n\u200b[Better Answer]\u200b\n{A}\n\u200b[End]\u200b", A),
    "cjk brackets": (f"太短。\n\n【Better Answer】{A}【End】", A),
    "escaped": (f"It is thin.\n\n\\[Better Answer\\] {A} \\[End\\]", A),
    "double brackets": (f"It is thin.\n\n[[Better Answer]] {A} [[End]]", A),
    "closing tag of its own": (f"It is thin.\n\n[Better Answer]\n{A}\n[/Better Answer]", A),
    "end of better answer": (f"[Better Answer]\n{A}\n[End of Better Answer]", A),
    "END": (f"[Better Answer]\n{A}\n[END]", A),
    "the end of the answer": (f"[Better Answer]\n{A}\n[The End of the Answer]", A),
    "end answer": (f"[Better Answer]\n{A}\n[End Answer]", A),
    "bold end only": (f"[Better Answer]\n{A}\n\n**[End]**", A),
    "eaten bracket": (f"[Better Answer] {A} [End", A),
    "backticked tags": (f"It is thin.\n\n`[Better Answer]` {A} `[End]`", A),
    "inline code end": ("[Better Answer] Finish the file with `[End]`.", "Finish the file with `[End]`."),
    "quoted end": ('[Better Answer] Every card says "[End]" in red. [End]', 'Every card says "[End]" in red.'),
    "end amid, none closing": (
        "[Better Answer] Write [End] on the last card. Then shuffle.",
        "Write [End] on the last card. Then shuffle.",
    ),
    "end on own line quoted": (
        "[Better Answer]\nFinish the file with the line\n[End]\nand save it.\n[End]",
        "Finish the file with the line\n[End]\nand save it.",
    ),
    "sign-off named end": (f"[Better Answer] {A} [End]\n\nI closed the section with [End] as asked.", A),
    "sign-off same line": (f"[Better Answer] {A} [End] I hope this improved answer is more helpful!", A),
    "explanation behind with end": (f"[Better Answer] {A} [End]\n\n[Explanation]\nThis names the height. [End]", A),
    "note behind, end again": (
        f"[Better Answer]\n{A}\n[End]\n\nThis revised answer is more detailed, since it names the height.\n[End]",
        A,
    ),
    "next pair hallucinated": (
        f"[Better Answer] {A} [End]\n\n[Instruction]\nName a tree.\n\n"
        f"[The Start of Answer]\nOak.\n[The End of Answer]\n\nThin.\n",
        A,
    ),
    "next pair hallucinated, no end": (
        f"[Better Answer] {A}\n\n[Instruction]\nName a tree.\n\n[The Start of Answer]\nOak.\n[The End of Answer]",
        A,
    ),
    "im_end": (f"It is thin.\n\n[Better Answer] {A} [End]<|im_end|>", A),
    "im_end no end": (f"It is thin.\n\n[Better Answer] {A}<|im_end|>\n", A),
    "eos": (f"It is thin.\n\n[Better Answer] {A}</s>", A),
    "struck": ("[Better Answer] The price is <s>9</s>", "The price is <s>9</s>"),
    "rule before end-less end": (f"It is thin.\n\n---\n\n[Better Answer]\n\n{A}\n\n---\n", A),
    "sign-off no end": (f"It is thin.\n\n[Better Answer] {A}\n\nI hope this improved answer is more helpful!", A),
    "sign-off no end inline": (f"It is thin.\n\n[Better Answer] {A} I hope this improved answer is more helpful!", A),
    "sign-off before end": (
        f"It is thin.\n\n[Better Answer] {A}\n\n"
        f"Let me know if you would like any changes to this improved answer.\n[End]",
        A,
    ),
    "sign-off with friendly tail": (
        f"[Better Answer] {A}\n\nI hope this revised answer meets your expectations! "
        f"Let me know if you need anything else.",
        A,
    ),
    "sign-off note": (
        f"[Better Answer] {A}\n\n*Note: This revised answer provides more detail than the original.*",
        A,
    ),
    "sign-off bullets": (
        f"[Better Answer] {A}\n\n**Why this answer is better:**\n- It names the height.\n- It is complete.",
        A,
    ),
    "sign-off rule": (
        f"[Better Answer] {A}\n\n---\n\nThis improved answer addresses the issues of the original answer.",
        A,
    ),
    "sign-off I have": (f"[Better Answer] {A}\n\nI have improved the original answer by naming the height.", A),
    "friendly stays": (
        f"[Better Answer] {A}\n\nI hope this helps! Let me know if you have any questions. [End]",
        f"{A}\n\nI hope this helps! Let me know if you have any questions.",
    ),
    "friendly stays 2": (
        f"[Better Answer] {A} I hope this answers your question!",
        f"{A} I hope this answers your question!",
    ),
    "friendly stays 3": (
        "[Better Answer] Rest and drink. Let me know if you'd like a version for children! [End]",
        "Rest and drink. Let me know if you'd like a version for children!",
    ),
    "friendly stays 4": (
        "[Better Answer] Dear Ms Ono,\n\nI hope this response finds you well.\n\n"
        "If you need more details, feel free to call.\n\nBest,\nJo [End]",
        "Dear Ms Ono,\n\nI hope this response finds you well.\n\nIf you need more details, feel free to call.\n\n"
        "Best,\nJo",
    ),
    "statement stays": (
        "[Better Answer] We must choose. The better answer is to wait, and it is more patient. [End]",
        "We must choose. The better answer is to wait, and it is more patient.",
    ),
    "begins here are": (
        "[Better Answer] Here are three new and better answers children give: yes, no, why. [End]",
        "Here are three new and better answers children give: yes, no, why.",
    ),
    "begins sure": ("[Better Answer] Sure! The moon pulls the sea. [End]", "Sure! The moon pulls the sea."),
    "revised essay": (
        "[Better Answer] Here is a revised version of your essay:\n\nOnce there was a fox. [End]",
        "Here is a revised version of your essay:\n\nOnce there was a fox.",
    ),
    "preamble based": (f"[Better Answer] Based on the critique above, here is an improved answer:\n\n{A} [End]", A),
    "preamble would be": (f"[Better Answer] A better and more complete answer would be: {A} [End]", A),
    "two, first a placeholder": (
        f"Format:\n[Better Answer] your answer [End]\n\nHere goes:\n\n[Better Answer] {A} [End]",
        A,
    ),
    "mention opens a line": (f"- [Better Answer] must name the height.\n\n[Better Answer] {A} [End]", A),
    "mention at line behind": (f"[Better Answer] {A} [End]\n\n[Better Answer] is complete now.", A),
    "draft and final": (f"[Better Answer] Water boils.\n\nHm, too short. Again:\n\n[Better Answer] {A} [End]", A),
    "two answers": ("[Better Answer] Heat it. [End]\n\n[Better Answer] Boil it. [End]", None),
    "same twice": (f"[Better Answer] {A} [End]\n\n[Better Answer] {A} [End]", A),
    "tag quoted amid": (
        f"Thin.\n[Better Answer] Put [Better Answer] before it. {A} [End]",
        f"Put [Better Answer] before it. {A}",
    ),
    "tag quoted amid, tag amid": (
        "So here it is: [Better Answer] Put [Better Answer] before it. [End]",
        "Put [Better Answer] before it.",
    ),
    "echo of the prompt": (
        f"We would like you to answer questions. "
        f"Generate a better answer, in the format of [Better Answer] your answer [End]\n\n"
        f"It is thin.\n\n[Better Answer] {A} [End]",
        A,
    ),
    "echo only": (
        "Generate a better answer, new and complete, in the format of [Better Answer] your answer [End]",
        None,
    ),
    "step label": (f"Step 1: It is thin.\nStep 2: [Better Answer] {A} [End]", A),
    "paren number": (f"(1) It is thin.\n(2) [Better Answer] {A} [End]", A),
    "roman": (f"I. It is thin.\nII. [Better Answer] {A} [End]", A),
    "emoji": (f"It is thin.\n\n✅ [Better Answer] {A} [End]", A),
    "keycap": (f"1️⃣ It is thin.\n\n2️⃣ [Better Answer] {A} [End]", A),
    "bold all": (f"It is thin.\n\n**[Better Answer] {A} [End]**", A),
    "bold all no end": (f"It is thin.\n\n**[Better Answer] {A}**", A),
    "underscore tag": (f"[Better_Answer] {A} [End]", A),
    "colon in tag": (f"[Better Answer:] {A} [End]", A),
    "space colon": (f"[Better Answer] : {A} [End]", A),
    "smiley": ("[Better Answer] :-) is a smiley. [End]", ":-) is a smiley."),
    "start of": (f"[The Start of Better Answer]\n{A}\n[The End of Better Answer]", A),
    "R1": (
        f"<think>\nOkay, so I need [Better Answer] x [End]. Let me see.\n</think>\n\n**Critique**\n\nThin.\n\n"
        f"**[Better Answer]**\n\n{A}\n\n**[End]**",
        A,
    ),
    "two thinkings": (f"<think>\n\n</think>\n<think>a</think>\n[Better Answer] {A} [End]", A),
    "thinking after a word": (
        f"Okay.\n<think>\n[Better Answer] draft [End]\n</think>\nThin.\n[Better Answer] {A} [End]",
        A,
    ),
    "thinking tag": (f"<thinking>[Better Answer] d [End]</thinking>\n[Better Answer] {A} [End]", A),
    "CRLF inside": ("Thin.\r\n[Better Answer]\r\n```\r\na\r\n\r\nb\r\n```\r\n[End]", "```\na\n\nb\n```"),
    "tilde fence": ("[Better Answer]\n~~~\n[End]\n~~~\nDone. [End]", "~~~\n[End]\n~~~\nDone."),
    "four ticks": (
        "[Better Answer]\n````md\n```\n[End]\n```\n````\nDone. [End]",
        "````md\n```\n[End]\n```\n````\nDone.",
    ),
    "None": ("[Better Answer] (none) [End]", None),
    "insert": ("[Better Answer] [Insert the better answer here] [End]", None),
    "your improved": ("[Better Answer] <your improved answer goes here> [End]", None),
    "smile": ("[Better Answer] 🙂 [End]", "🙂"),
    "plus": ("[Better Answer] + [End]", "+"),
    "llama2 refusal": (
        "[Better Answer] I cannot fulfill your request. "
        "I'm just an AI, it's not within my programming or ethical guidelines to provide that. [End]",
        None,
    ),
    "decline": ("I must respectfully decline to rewrite this.", None),
    "chinese refusal": ("[Better Answer] 抱歉，我无法回答这个问题。[End]", None),
    "won't be able": ("[Better Answer] I'm sorry, but I won't be able to help with that. [End]", None),
    "begins sorry": (
        "[Better Answer] Sorry for the wait! Your parcel ships today. [End]",
        "Sorry for the wait! Your parcel ships today.",
    ),
    "understand": (
        "[Better Answer] I understand that grief takes time. Write letters to her. [End]",
        "I understand that grief takes time. Write letters to her.",
    ),
    "I do not write": (
        "[Better Answer] I do not write poems at noon, said the poet. [End]",
        "I do not write poems at noon, said the poet.",
    ),
    "story": ("[Better Answer] They lived happily.\n\nThe End [End]", "They lived happily.\n\nThe End"),
    "story no end": ("[Better Answer] They lived happily.\n\nThe End", "They lived happily.\n\nThe End"),
    "pseudo": ("[Better Answer]\nIf x\n  stop\nEnd", "If x\n  stop\nEnd"),
    "template": (
        "[Better Answer]\nDear [Name],\n\n[Your message]\n\n[Your Name]\n[End]",
        "Dear [Name],\n\n[Your message]\n\n[Your Name]",
    ),
    "song": ("[Better Answer]\n[Verse 1]\nRain\n\n[Chorus]\nRain, rain", "[Verse 1]\nRain\n\n[Chorus]\nRain, rain"),
    "index": ("[Better Answer] x = arr[end]", "x = arr[end]"),
    "closed heading": (f"### [Better Answer] ###\n{A}\n### [End] ###", A),
    "end in parentheses": (f"[Better Answer]\n{A}\n\n(End)", A),
    "regret in a letter": (
        "[Better Answer] I must decline your kind invitation. [End]",
        "I must decline your kind invitation.",
    ),
    "latex": ("[Better Answer] \\[ E = mc^2 \\] holds. [End]", "\\[ E = mc^2 \\] holds."),
}
MORE_PAIRS = {
    "titles": f"Vague.\n\n**New Instruction:** {Q}\n\n**New Answer:** {A}",
    "heading titles": f"### Critique\nVague.\n\n### New Instruction\n{Q}\n\n### New Answer\n{A}\n",
    "plain titles": f"1. Vague.\n\n2. New Instruction: {Q}\n\n3. New Answer: {A}",
    "mixed": f"Vague.\n\n**New Instruction:** {Q}\n\n[New Answer] {A} [End]",
    "wrong order": f"Vague.\n\n[New Answer] {A} [End]\n\n[New Instruction] {Q} [End]",
    "format first": f"[New Instruction] your instruction [End]\n[New Answer] your answer [End]\n\nNow mine:\n\n"
    f"[New Instruction] {Q} [End]\n[New Answer] {A} [End]",
    "rule between": f"Vague.\n\n---\n\n[New Instruction] {Q}\n\n---\n\n[New Answer] {A}\n\n---",
    "number alone": f"1.\nVague.\n\n2.\n[New Instruction] {Q}\n\n3.\n[New Answer] {A}",
    "title left": f"1. Vague.\n\n2. [New Instruction] {Q}\n\n3. "
    f"Answer the newly generated instruction:\n[New Answer] {A} [End]",
    "title left bold": f"**[New Instruction]** {Q}\n\n**Answer to the new instruction:**\n\n**[New Answer]** {A}",
    "instruction talked about": f"Vague.\n[New Instruction] {Q}\n\n"
    f"This new instruction is more complex and can be answered independently.\n\n[New Answer] {A} [End]",
    "instruction talked about 2": f"Vague.\n[New Instruction] {Q} "
    f"Let me know if you would like changes to this rewritten instruction. [End]\n[New Answer] {A} [End]",
    "answer talked about": f"Vague.\n[New Instruction] {Q} [End]\n[New Answer] {A}\n\n"
    f"I hope this new instruction and answer are more helpful!",
    "preamble question": f"[New Instruction] Here is a new and more challenging question: {Q} [End]\n"
    f"[New Answer] {A} [End]",
    "bold all": f"**[New Instruction] {Q}**\n\n**[New Answer]** {A}",
    "fenced": f"```\n[New Instruction] {Q} [End]\n\n[New Answer] {A} [End]\n```",
    "fence each": f"Vague.\n\n```\n[New Instruction]\n{Q}\n[End]\n```\n\n```\n[New Answer]\n{A}\n[End]\n```",
    "one line ends numbered": f"1. Vague. 2. [New Instruction] {Q} [End] 3. [New Answer] {A} [End]",
    "closing tags": f"[New Instruction]{Q}[/New Instruction]\n\n[New Answer]{A}[/New Answer]",
    "end of new": f"[New Instruction] {Q} [End of New Instruction]\n\n[New Answer] {A} [End of New Answer]",
    "sure": f"Sure! Here's my analysis:\n\n1. Vague.\n\n2. **New Instruction**: [New Instruction] {Q} [End]\n\n3. "
    f"**New Answer**: [New Answer] {A} [End]",
}


@pytest.mark.parametrize(("reply", "answer"), MORE_ANSWERS.values(), ids=MORE_ANSWERS)
def test_careful_reader_takes_the_answer_or_nothing(reply, answer):
    rewrite = RESPONSE.parse(reply)
    assert (rewrite.instruction, rewrite.response) == (None, answer)
    assert (rewrite.error is None) == (answer is not None)


@pytest.mark.parametrize("reply", MORE_PAIRS.values(), ids=MORE_PAIRS)
def test_careful_reader_takes_both_sections(reply):
    rewrite = INSTRUCTION.parse(reply)
    assert (rewrite.instruction, rewrite.response, rewrite.error) == (Q, A, None)


UNDECIDABLE = {
    "an end amid the answer, or an answer and a remark": f"[Better Answer]\n{A}\n[End]\n\nHeat it slowly.\n[End]",
    "two drafts": "[Better Answer] Heat it.\n\n[Better Answer] Boil it.",
    "a whole section inside another": f"[Better Answer]\nWrite:\n[Better Answer] {A} [End]\nand go on.\n[End]",
}


@pytest.mark.parametrize("reply", UNDECIDABLE.values(), ids=UNDECIDABLE)
def test_reply_that_can_be_read_in_two_ways_is_not_read(reply):
    assert RESPONSE.parse(reply).error.startswith("unparsed: ")


def test_sections_in_the_wrong_order_count_only_where_each_is_closed():
    assert INSTRUCTION.parse(f"[New Answer] {A} [End]\n[New Instruction] {Q} [End]").response == A
    rewrite = INSTRUCTION.parse(f"[New Answer] would follow.\n\n[New Instruction] {Q} [End]")
    assert rewrite.response is None and rewrite.error.startswith("unparsed: ")


def test_fence_around_the_whole_reply_is_no_part_of_the_answer_but_one_around_code_is():
    assert RESPONSE.parse("```\n[Better Answer]\n```sh\nls\n```\n[End]\n```").response == "```sh\nls\n```"


# ---- properties


# what the parser rightly takes for something else: tags, placeholders, refusals, thinking, end tokens
NOT_SURELY = re.compile(
    r"(?i)answer|response|instruction|n/?a\W*$|none|tbd|todo|same as|not appl|sorry|apolog|"
    r"\bi (?:ca|wo|am|mu|do|wi)|i.m |"
    r"request|think|[\[【［(][^\]】］]*end|\*\* *end|# *end|</s>|<\||<end|[\u200b\u2060\ufeff]"
)
PARTS = (
    "End Ending end in [1] ] [x] [Verse] **bold** *a* _b_ # ## > - --- 1. 2) ``` ```py ~~~ ` : ： N/A? rain and more "
    "Sure! Here is are three I hope this helps! Let me know <b> </b> { } \\ 水 ß"
)


def is_surely_an_answer(text):
    return any(char.isalnum() for char in text) and not NOT_SURELY.search(text)


TEXTS = (
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), min_size=1, max_size=80),
        st.lists(st.sampled_from([*PARTS.split(), "\n", "\n\n", "\t"]), min_size=1, max_size=14).map(" ".join),
    )
    .map(str.strip)
    .filter(is_surely_an_answer)
)


@settings(max_examples=500, deadline=None)
@given(TEXTS, TEXTS, TEXTS)
def test_what_is_rendered_is_read_back_to_the_character(instruction, response, critique):
    for prompt in REFLECTIONS.values():
        part = None if prompt in (RESPONSE, PROMPTS["response-json"]) else instruction
        rewrite = Rewrite(part, response, critique)
        assert prompt.parse(prompt.render(rewrite)) == rewrite


@settings(max_examples=500, deadline=None)
@given(*2 * [st.lists(st.one_of(st.sampled_from([*PIECES, *PARTS.split(), "\n#", "\n- "]), TEXTS)).map(" ".join)])
def test_reply_in_just_the_form_asked_for_is_read_by_the_same_rules_as_others(instruction, response):
    for prompt, reply in (
        (RESPONSE, f"[Better Answer] {response} [End]"),
        (INSTRUCTION, f"2. [New Instruction] {instruction} [End]\n\n3. [New Answer]\n{response}\n[End]\n"),
    ):
        # a bracket in the critique changes nothing but that the reply is none of just that form
        plain, other = prompt.parse(f"Thin.\n\n{reply}"), prompt.parse(f"Thin [1].\n\n{reply}")
        assert plain[:2] == other[:2] and plain.error == other.error


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(st.sampled_from([*PIECES, *HOSTILE, "{", '"response"', ": "]), st.text(max_size=9))), TEXTS)
def test_no_text_makes_parse_raise(pieces, text):
    for prompt in REFLECTIONS.values():
        rewrite = prompt.parse("".join([*pieces, text]))
        assert (rewrite.response is None) == (rewrite.error is not None)
        assert rewrite.error is None or rewrite.error.startswith(ERRORS)


@pytest.mark.parametrize("name", REFLECTIONS)
def test_hostile_replies_take_linear_time(name):
    units = [
        *HOSTILE,
        "{",
        "{}",
        '{"a":{}}',
        "```\n[End]\n```\n",
        "By x, this answer ",
        "\nBest, ",
        '{"a":',
        '{"a":[',
        '{"response": "',
        '{"response":"x","a":{',
        "\n<think>",
        "~~~\n",
        "[[",
        "【",
    ]
    for unit in units:
        for start in ("", "[Better Answer] ", "[New Instruction] x [New Answer] ", '{"response": "'):
            reply = start + unit * (100_000 // len(unit))
            begin = time.process_time()
            PROMPTS[name].parse(reply)
            assert time.process_time() - begin < 0.5, (start, unit)  # some 0.03 s; quadratic ones take minutes


# ---- JSON

PAIR_JSON, ANSWER_JSON = PROMPTS["instruction-json"], PROMPTS["response-json"]
OBJECT = json.dumps({"critique": "Thin.", "response": A}, ensure_ascii=False)
GOOD_JSON = {
    "as asked": OBJECT,
    "fenced": f"```json\n{OBJECT}\n```",
    "text around": f"Here is the JSON you asked for:\n\n{OBJECT}\n\nI hope this helps!",
    "thinking": f'<think>Perhaps {{"response": "draft"}}</think>\n{OBJECT}',
    "thinking whose beginning the chat template kept": f'Perhaps {{"response": "draft"}}\n</think>\n{OBJECT}',
    "BOM": f"\ufeff{OBJECT}",
    "end token": f"{OBJECT}<|im_end|>",
    "extra keys": json.dumps({"critique": "Thin.", "score": 3, "response": A, "tags": ["x"]}),
    "other case": json.dumps({"Critique": "Thin.", "Response": A}),
    "wrapped": json.dumps({"result": {"critique": "Thin.", "response": A}}),
    "in a list": json.dumps([{"critique": "Thin.", "response": A}]),
    "braces before": f"The set {{x}} and {{ y }} are named.\n{OBJECT}",
    "twice the same": f"{OBJECT}\n{OBJECT}",
    "preamble": json.dumps({"critique": "Thin.", "response": f"Here is an improved answer:\n\n{A}"}),
}


@pytest.mark.parametrize("reply", GOOD_JSON.values(), ids=GOOD_JSON)
def test_json_reply_is_read_to_the_character(reply):
    assert ANSWER_JSON.parse(reply) == Rewrite(None, A, "Thin.")


def test_json_reply_to_the_instruction_prompt_brings_the_pair():
    reply = json.dumps({"critique": "Vague.", "instruction": Q, "response": A})
    assert PAIR_JSON.parse(reply) == Rewrite(Q, A, "Vague.")


def test_line_ends_that_a_weak_endpoint_left_in_strings_are_kept():
    assert (
        ANSWER_JSON.parse('{"critique": "Thin.", "response": "One.\n\nTwo.\tThree."}').response
        == "One.\n\nTwo.\tThree."
    )


def test_words_of_thinking_inside_a_json_string_stay():
    assert ANSWER_JSON.parse('{"response": "Models write </think> last."}').response == "Models write </think> last."


def test_json_reply_without_a_critique_is_a_rewrite_all_the_same():
    assert ANSWER_JSON.parse(json.dumps({"response": A})) == Rewrite(None, A)


UNUSABLE_JSON = {
    "empty": (ANSWER_JSON, "", "unparsed"),
    "prose": (ANSWER_JSON, "The answer is fine.", "unparsed"),
    "cut off": (ANSWER_JSON, OBJECT[:-20], "unparsed"),
    "other keys": (ANSWER_JSON, '{"answer": "x"}', "unparsed"),
    "no instruction": (PAIR_JSON, OBJECT, "unparsed"),
    "no response": (PAIR_JSON, json.dumps({"critique": "", "instruction": Q}), "unparsed"),
    "null": (ANSWER_JSON, '{"response": null}', "unparsed"),
    "a list": (ANSWER_JSON, '{"response": ["x"]}', "unparsed"),
    "a number": (ANSWER_JSON, '{"response": 42}', "unparsed"),
    "blank": (ANSWER_JSON, '{"response": " \\n"}', "unparsed"),
    "two": (ANSWER_JSON, '{"response": "Heat it."} {"response": "Boil it."}', "unparsed"),
    "deep": (ANSWER_JSON, '{"a":' * 20_000, "unparsed"),
    "deep list": (ANSWER_JSON, '{"response":' + "[" * 100_000, "unparsed"),
    "placeholder": (ANSWER_JSON, '{"response": "..."}', "placeholder"),
    "N/A": (ANSWER_JSON, '{"response": "N/A"}', "placeholder"),
    "refusal in the object": (ANSWER_JSON, '{"response": "I\'m sorry, but I can\'t help with that."}', "refused"),
    "refusal key": (ANSWER_JSON, '{"refusal": "I will not."}', "refused"),
    "refusal in prose": (ANSWER_JSON, "I'm sorry, but I can't assist with that.", "refused"),
}


@pytest.mark.parametrize(("prompt", "reply", "code"), UNUSABLE_JSON.values(), ids=UNUSABLE_JSON)
def test_json_reply_without_a_rewrite_has_its_reason(prompt, reply, code):
    rewrite = prompt.parse(reply)
    assert rewrite.instruction is None and rewrite.response is None
    assert rewrite.error.startswith(f"{code}: ") and len(rewrite.error) < 250


def test_cut_off_json_is_truncated_where_the_endpoint_says_so():
    assert ANSWER_JSON.parse(OBJECT[:-20], "length").error.startswith("truncated: ")


@pytest.mark.parametrize(("part", "keys"), [("response", 2), ("instruction", 3)])
def test_json_prompt_asks_the_same_and_names_its_schema(part, keys):
    tagged, structured = (PROMPTS[name].chat("Name a river.", "The Rhine.", "x") for name in (part, f"{part}-json"))
    assert structured[0] == tagged[0]
    asked = structured[1]["content"]
    assert asked.startswith(tagged[1]["content"].split(", put the new")[0].split(", in the format")[0])
    assert "[End]" not in asked and "JSON" in asked
    form = PROMPTS[f"{part}-json"].response_format
    schema = form["json_schema"]["schema"]
    assert form["type"] == "json_schema" and form["json_schema"]["strict"] is True
    assert len(schema["properties"]) == keys and schema["required"] == list(schema["properties"])
    assert schema["additionalProperties"] is False and json.dumps(form)
    assert PROMPTS[part].response_format is None


# ---- own prompts

OWN = dict(system="Sei knapp.", user="{history}{instruction}\n{input}{response}\nSchreibe [Besser] dein Text [Ende]")


def test_prompt_in_another_language_brings_its_tags_end_and_blocks():
    prompt = ReflectionPrompt(
        **OWN, tags=("Besser",), end="Ende", input_block="Eingabe: {input}\n", history_block="Vorher:\n{turns}\n"
    )
    history = [{"role": "user", "content": "Hallo"}]
    asked = prompt.chat("Übersetze.", "Bonjour.", input="Guten Tag", history=history)[1]["content"]
    assert asked.startswith("Vorher:\nUSER: Hallo\nÜbersetze.\nEingabe: Guten Tag\nBonjour.\n")
    for end in ("[Ende]", "**[ende]**", "[End]", "[/Besser]"):
        assert (
            prompt.parse(f"Zu knapp.\n\n[Besser] Am Ende regnet es. {end}\nBis bald!").response == "Am Ende regnet es."
        )
    assert prompt.parse("[Besser] dein Text [Ende]").error.startswith("placeholder: ")


def test_template_without_braces_of_json_reads_json_by_a_schema():
    schema = {"type": "object", "properties": {"response": {"type": "string"}}}
    prompt = ReflectionPrompt(system="", user="{instruction} {response} Reply as {{...}}.", schema=schema)
    assert prompt.parse('{"response": "Rain."}') == Rewrite(None, "Rain.")
    assert prompt.response_format["json_schema"]["schema"]["additionalProperties"] is False


REFUSED = {
    "example in other tags": (dict(tags=("Besser",), example="Knapp.\n[Better] Regen. [End]"), r"no \[Besser\]"),
    "example with one section": (dict(tags=("Neu", "Antwort"), example="[Neu] Regen? [End]"), r"no \[Antwort\]"),
    "example of placeholders": (
        dict(tags=("Besser",), example="[Besser] dein Text [Ende]", end="Ende"),
        "placeholder",
    ),
    "no tags": (dict(tags=()), "one section"),
    "three tags": (dict(tags=("a", "b", "c")), "one section"),
    "a string": (dict(tags="Besser"), r"give \('Besser',\)"),
    "a criterion": (dict(response_criteria="Kürze"), r"`response_criteria` is one text.*give \('Kürze',\)"),
    "empty tag": (dict(tags=(" ",)), "empty tag"),
    "empty end": (dict(tags=("Besser",), end=""), "empty tag"),
    "duplicate tags": (dict(tags=("Better  Answer", "better answer")), "twice"),
    "tag is the end": (dict(tags=("Schluss",), end="schluss"), "closes a section"),
    "tag is an English end": (dict(tags=("The End",), end="Ende"), "closes a section"),
    "tags and schema": (dict(tags=("a",), schema={"properties": {"response": {}}}), "not both"),
    "schema without response": (dict(schema={"properties": {"answer": {}}}), "`response`"),
    "unknown field": (dict(tags=("a",), user="{instruction}{response}{kontext}"), r"\{kontext\}.*\{history\}"),
    "no response": (dict(tags=("a",), user="{instruction}"), r"lacks \{response\}"),
    "lone brace": (dict(tags=("a",), user="{instruction}{response} {"), "Double the braces"),
    "positional": (dict(tags=("a",), user="{instruction}{response} {}"), "fields are"),
    "input block": (dict(tags=("a",), input_block="Eingabe: {x}"), r"\{x\}"),
    "input block without it": (dict(tags=("a",), input_block="Eingabe"), r"lacks \{input\}"),
    "history block": (dict(tags=("a",), history_block="{history}"), r"\{turns\}"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_prompt_that_cannot_work_is_refused_at_construction(change, message):
    with pytest.raises(SettingsError, match=message):
        ReflectionPrompt(**{**OWN, **change})


@pytest.mark.parametrize("name", REFLECTIONS)
@pytest.mark.parametrize("module", [pickle, dill])
def test_prompt_survives_pickling_and_equals_itself(module, name):
    again = module.loads(module.dumps(PROMPTS[name]))
    assert again == PROMPTS[name] and hash(again) == hash(PROMPTS[name])
    assert again.parse(again.render(Rewrite(Q, A, "Vague."))).response == A
    assert PROMPTS["response"] != PROMPTS["response-json"]


# ---- the teacher's words, and what only looks like them

LETTER = "Dear Ms Ono,\n\nWe have changed our original response: you get a refund.\n\nBest,\nJo"
KEPT = {
    "letter": LETTER,
    "section amid": "One.\n\nThis improved answer is more specific.\n\n## Two\n\nThree.",
    "title amid": "Tips.\n\nWhy this answer is better: it is short.\n\n## Timing\n\nNow.",
    "request in a letter": "Dear Lee,\n\nPlease let me know if I should revise my answer to question 3.\n\nBest,\nAna",
    "regret with an answer": "I cannot provide a single number: it depends on altitude.",
    "regret with code": "I am unable to create a file for you, but here is the code:\n\n```\ntouch a\n```",
    "polite": "Here is a polite response to the customer:\n\nThank you.",
    "French": "Voici la réponse du serveur :\n\nOK",
    "what a server says": "This is the complete response that the server returns:\n\nOK",
    "complete": "The complete answer is: 42.",
    "immunity": "It learns.\n\nThe secondary response is stronger than the previous one.",
}


@pytest.mark.parametrize("answer", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("form", ["Thin.\n\n[Better Answer] {} [End]", "Thin.\n\n[Better Answer]\n{}"])
def test_what_only_sounds_like_the_teacher_is_kept(form, answer):
    assert RESPONSE.parse(form.replace("{}", answer)).response == answer


ASKED = [
    'Rewrite this prompt: "dogs". The revised prompt should be more detailed.',
    'Improve the answer below.\n\nThe improved answer should be more detailed.\n\nAnswer: "Rome fell in 476."',
    "I cannot write to /var/log. Why?",
    "I can't create a new user in Django admin: it raises IntegrityError. Explain what is wrong.",
    "I'm not able to complete my thesis on time. Draft a request for more time.",
]


@pytest.mark.parametrize("asked", ASKED)
def test_instructions_may_speak_of_answers_and_of_what_their_writer_cannot_do(asked):
    reply = f"Vague.\n\n[New Instruction] {asked} [End]\n[New Answer] {A} [End]"
    assert INSTRUCTION.parse(reply)[:2] == (asked, A)


SAID = [
    "This answer is more detailed and accurate than the original answer.",
    "This response is more helpful, relevant and accurate than the original.",
    "This revised answer addresses all of the shortcomings identified above.",
    "Explanation: This answer is better than the original as it names the height.",
    "The above answer is better because it names the height.",
    "This improved answer is better because:\n\n1. It names the height.\n2. It says why.\n\nI hope this helps!",
]
BEGUN = [
    "Here's a revised answer that addresses the issues above:",
    "Here is a more helpful, relevant, accurate, and detailed answer:",
    "Here is the new and complete answer as requested:",
    "Here is my attempt at a better answer:",
    "A better answer to the given instruction would be as follows:",
    "### Improved Answer",
    "以下是改进后的回答：",
    "Hier ist eine verbesserte Antwort:",
    "Aquí tienes una respuesta mejorada:",
    "Voici une réponse améliorée :",
]


@pytest.mark.parametrize("words", SAID)
def test_more_sign_offs_are_cut(words):
    assert RESPONSE.parse(f"Thin.\n\n[Better Answer] {A}\n\n{words} [End]").response == A
    assert RESPONSE.parse(f"Thin.\n\n[Better Answer]\n{A}\n\n{words}").response == A


@pytest.mark.parametrize("words", BEGUN)
def test_more_preambles_are_cut(words):
    assert RESPONSE.parse(f"Thin.\n\n[Better Answer] {words}\n\n{A} [End]").response == A


REGRETS = [
    "I'm sorry, but as an AI language model I cannot help with that.",
    "I cannot and will not provide that.",
    "I'm sorry, but I can't share that.",
    "My apologies, but I am unable to process this request.",
    "No, I can't help with that.",
    "I need to decline this request.",
    "作为一个AI语言模型，我无法回答这个问题。",
    "申し訳ありませんが、そのリクエストにはお応えできません。",
    "Tut mir leid, das kann ich nicht beantworten.",
]


@pytest.mark.parametrize("words", REGRETS)
def test_more_refusals_are_refused(words):
    assert RESPONSE.parse(f"Thin.\n\n[Better Answer] {words} [End]").error.startswith("refused: ")


def test_a_refusal_in_place_of_an_instruction_is_refused():
    reply = f"[New Instruction] I'm sorry, but I can't help with that request. [End]\n[New Answer] {A} [End]"
    assert INSTRUCTION.parse(reply).error.startswith("refused: ")


CLOSED = {
    'Say "Hi"[End]\n\nThis is better.': 'Say "Hi"',
    "Run `ls -l`[End]": "Run `ls -l`",
    'print("[End]") is it.\n[End]': 'print("[End]") is it.',
    "Roses are red [End] (I kept it short.)": "Roses are red",
    "Roses are red [End] 😊": "Roses are red",
    "Roses are red\n[End]\nthis poem is better.": "Roses are red",
    "水在一百度沸腾[End]这个答案更好。": "水在一百度沸腾",
    "Roses are red [**End**]": "Roses are red",
    "Roses are red.<|return|>": "Roses are red.",
}


@pytest.mark.parametrize(("text", "answer"), CLOSED.items())
def test_an_only_end_tag_closes_whatever_follows(text, answer):
    assert RESPONSE.parse(f"Thin.\n\n[Better Answer] {text}").response == answer


def test_the_prompts_own_number_behind_an_end_tag_is_no_part_of_the_instruction():
    reply = "1. Vague.\n\n2. [New Instruction] Sum xs [End] 3. [New Answer] 42 [End]"
    assert INSTRUCTION.parse(reply)[:2] == ("Sum xs", "42")


@pytest.mark.parametrize("words", ["Now, let me answer the new instruction:", "3. Here is the answer:"])
def test_what_leads_over_to_the_answer_is_no_part_of_the_instruction(words):
    reply = f"Vague.\n\n[New Instruction] {Q}\n\n{words}\n\n[New Answer] {A}"
    assert INSTRUCTION.parse(reply)[:2] == (Q, A)


def test_a_tag_below_its_own_title_opens_the_section():
    assert RESPONSE.parse(f"### Better Answer\nHere it is: [Better Answer] {A} [End]").response == A


def test_a_tag_of_thinking_that_is_quoted_takes_nothing_away():
    reply = RESPONSE.parse(f"It drops the `</think>` tag.\n\n[Better Answer] {A} [End]")
    assert reply == Rewrite(None, A, "It drops the `</think>` tag.")


REASONS = ["model_length", "max_output_tokens", "FinishReason.MAX_TOKENS", "abort", "error", "RECITATION"]


@pytest.mark.parametrize("reason", REASONS)
def test_replies_that_are_not_whole_are_not_used_by_whatever_name(reason):
    assert RESPONSE.parse(f"[Better Answer] {A}", reason).error.split(":")[0] in ("truncated", "refused")


@pytest.mark.parametrize("reason", ["stop", "eos_token", "stop_sequence", "end_turn", "tool_calls", "", None])
def test_replies_that_ended_are_used(reason):
    assert RESPONSE.parse(f"[Better Answer] {A}", reason).response == A


def test_json_keeps_latex_whose_backslashes_were_not_doubled():
    reply = PROMPTS["response-json"].parse(
        r'{"critique": "Thin.", "response": "$\frac{1}{2} \times \theta$\nand \boxed{3}"}'
    )
    assert reply.response == "$\\frac{1}{2} \\times \\theta$\nand \\boxed{3}"


def test_json_with_half_a_surrogate_pair_can_be_stored():
    reply = PROMPTS["response-json"].parse(r'{"critique": {"Depth": "low \ud83d"}, "response": "ok \ud83d"}')
    assert reply == Rewrite(None, "ok ?", '{"Depth": "low ?"}')
