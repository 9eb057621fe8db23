import random

import pytest

from hf_reflect import PROMPTS
from hf_reflect.prompts import ReflectionPrompt

INSTRUCTION, RESPONSE = PROMPTS["instruction"], PROMPTS["response"]
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
