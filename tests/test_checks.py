import pickle
import re
import warnings

import pytest
from datasets.fingerprint import Hasher

from hf_reflect import ReflectError
from hf_reflect.checks import CHECKS, all_of, code_still_parses, same_language

RAIN = {
    "ar": "يطرق المطر النافذة برفق بينما نجلس في المطبخ ونتحدث عن رحلة الصيف. لا أحد يريد أن ينهض أولا.",
    "de": "Der Regen klopft leise an das Fenster, während wir in der Küche über die Reise im Sommer sprechen.",
    "en": "Rain taps softly on the window while we sit in the kitchen and talk about the trip in summer.",
    "es": "La lluvia golpea suavemente la ventana mientras hablamos en la cocina sobre el viaje de este verano.",
    "fr": "La pluie frappe doucement à la fenêtre pendant que nous parlons dans la cuisine du voyage de cet été.",
    "hi": "बारिश धीरे-धीरे खिड़की पर दस्तक दे रही है और हम रसोई में बैठकर गर्मियों की यात्रा की बात कर रहे हैं।",
    "ja": "雨が静かに窓を叩いている間、私たちは台所に座って夏の旅行について話しています。",
    "ko": "비가 조용히 창문을 두드리는 동안 우리는 부엌에 앉아 여름 여행에 대해 이야기합니다.",
    "pl": "Deszcz cicho stuka w okno, a my siedzimy w kuchni i rozmawiamy o letniej podróży.",
    "ru": "Дождь тихо стучит в окно, пока мы сидим на кухне и говорим о летней поездке.",
    "zh": "雨轻轻地敲着窗户，我们坐在厨房里谈论夏天的旅行。谁也不想第一个站起来。",
}
WEATHER = {
    "ar": "اشرح لماذا تمطر السماء في الخريف أكثر من الصيف.",
    "de": "Erkläre in einfachen Worten, warum es im Herbst öfter regnet als im Sommer.",
    "en": "Explain in simple words why it rains more often in autumn than in summer.",
    "es": "Explica con palabras sencillas por qué llueve más en otoño que en verano.",
    "fr": "Explique avec des mots simples pourquoi il pleut plus souvent en automne qu'en été.",
    "hi": "सरल शब्दों में समझाइए कि गर्मियों की तुलना में शरद ऋतु में बारिश अधिक क्यों होती है।",
    "ja": "夏よりも秋によく雨が降る理由を簡単な言葉で説明してください。",
    "ko": "여름보다 가을에 비가 더 자주 오는 이유를 쉬운 말로 설명해 주세요.",
    "pl": "Wyjaśnij prostymi słowami, dlaczego jesienią pada częściej niż latem.",
    "ru": "Объясни простыми словами, почему осенью дождь идёт чаще, чем летом.",
    "zh": "请用简单的话解释为什么秋天比夏天更常下雨，并举一个例子。",
}


def row(response, instruction="Say something.", input=""):
    return {"instruction": instruction, "input": input, "response": response}


# ---- same language


@pytest.mark.parametrize("old", RAIN)
@pytest.mark.parametrize("new", RAIN)
def test_a_response_in_another_language_is_refused(old, new):
    parent = row(RAIN[old], WEATHER[old])
    complaint = same_language(parent, {**parent, "response": WEATHER[new]})
    if old == new:
        assert complaint is None
    else:
        assert complaint == f"the new response is in another language ({new}) than its parent's ({old})"


@pytest.mark.parametrize("language", set(WEATHER) - {"en"})
def test_a_new_instruction_in_english_is_refused_where_the_data_is_not(language):
    parent = row(RAIN[language], WEATHER[language])
    complaint = same_language(parent, row(RAIN["en"], WEATHER["en"]))
    assert complaint == f"the new instruction is in another language (en) than its parent's ({language})"
    assert same_language(parent, row(WEATHER[language], RAIN[language])) is None


def test_a_translation_may_change_the_language_of_the_response():
    task = "Translate the following sentence into French, please, and keep its tone."
    parent = row(RAIN["fr"], task, RAIN["en"])
    better = RAIN["fr"].replace("doucement", "tout doucement")
    explained = f"{RAIN['en']} In French one would say it with a reflexive verb."
    assert same_language(parent, {**parent, "response": better}) is None
    assert same_language(parent, {**parent, "response": explained}) is None
    assert "(de)" in same_language(parent, {**parent, "response": RAIN["de"]})


def test_a_new_instruction_may_quote_the_input_of_the_old_one():
    parent = row("Rain.", "Tell me in one English word what the following text is about.", RAIN["de"])
    assert same_language(parent, row("Rain.", f"{RAIN['de']} {WEATHER['de']} What is it about?")) is None
    assert "(es)" in same_language(parent, row("Rain.", f"{RAIN['es']} {WEATHER['es']}"))


def test_a_new_instruction_may_ask_for_an_answer_in_its_own_language():
    parent = row(RAIN["fr"], "Translate the following sentence into French.", RAIN["en"])
    assert same_language(parent, row(RAIN["en"], WEATHER["en"])) is None


@pytest.mark.parametrize(
    "unsure",
    [
        "42",
        "",
        "Bonjour.",
        "!?",
        "1, 2, 3, 4, 5 " * 40,
        "https://example.org/der-regen-klopft-leise-an-das-fenster-waehrend-wir-sprechen",
        "```python\nfor regen in fenster:\n    print('der regen klopft leise an das fenster')\n```",
        "`der Regen klopft leise an das Fenster, während wir sprechen`",
        "Homo sapiens, Canis lupus, Felis catus, Panthera leo, Quercus robur, Pinus sylvestris",
        "Mozart, Beethoven, Schubert, Brahms, Schumann, Mendelssohn, Wagner and Strauss",
        "Paris, Lyon, Marseille, Bordeaux, Toulouse, Nantes, Strasbourg, Montpellier",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "\ud800" * 60,
        "\x00" * 60,
    ],
)
def test_what_nobody_can_be_sure_of_passes(unsure):
    known = row(RAIN["en"], WEATHER["en"])
    assert same_language(known, {**known, "response": unsure}) is None
    assert same_language({**known, "response": unsure}, {**known, "response": RAIN["ja"]}) is None


def test_code_in_a_response_does_not_make_it_english():
    code = '```python\nfor line in open("data"):\n    print("this is the next line of the file", line)\n```\n' * 5
    parent = row(RAIN["de"], WEATHER["de"])
    assert same_language(parent, {**parent, "response": f"{RAIN['de']}\n{code}"}) is None
    assert "(en)" in same_language(parent, {**parent, "response": f"{code}{RAIN['en']}"})


def test_close_relatives_count_as_one_language():
    danish = "Regnen banker stille på vinduet, mens vi sidder i køkkenet og taler om sommerens rejse."
    norwegian = "Regnet banker stille på vinduet mens vi sitter på kjøkkenet og snakker om sommerens reise."
    assert same_language(row(danish), row(norwegian)) is None
    assert (
        same_language(row(RAIN["zh"]), row("雨輕輕地敲著窗戶，我們坐在廚房裡談論夏天的旅行。誰也不想第一個站起來。"))
        is None
    )
    assert same_language(row(danish), row(RAIN["de"])) is not None


def test_a_missing_detector_is_told_with_the_way_to_install_it(monkeypatch):
    from hf_reflect import checks

    def without(name, *args, **kwargs):
        raise ImportError(f"No module named {name!r}")

    checks._identifier.cache_clear()
    checks._language.cache_clear()
    monkeypatch.setattr(checks.importlib, "import_module", without)
    with pytest.raises(ReflectError, match=r"py3langid.*pip install 'py3langid>=0.4,<0.5'"):
        same_language(row(RAIN["de"]), row(RAIN["en"]))
    checks._identifier.cache_clear()


# ---- code


def block(code, language="python", fence="```"):
    return f"Here it is:\n\n{fence}{language}\n{code}\n{fence}\n\nHave fun."


PARSES = {
    "plain": block("def f(x):\n    return x + 1"),
    "py": block("print(1)", "py"),
    "doctest": block(">>> for n in range(2):\n...     print(n)\n...\n0\n1\n>>> x = {}\n>>> x['a']\nTraceback: :-("),
    "IPython": block("In [1]: def f():\n   ...:     return 1\n\nIn [2]: f()\nOut[2]: 1"),
    "magics": block("%matplotlib inline\n!pip install numpy\nimport numpy as np\nnp.sum?"),
    "cell magic": block("%%bash\nls | wc -l"),
    "await at the top": block("await client.get(url)"),
    "return at the top": block("return x"),
    "method, indented as a whole": block("    def f(self):\n        return 1\n\n    x = 2"),
    "block in a list": "1. First\n\n   ```python\n   if x:\n       y()\n   ```\n2. Then",
    "longer fence around a fence": block('x = """\n```python\nif\n```\n"""', fence="````"),
    "tildes": block("x = '```'", fence="~~~"),
    "regular expression": block('import re\nre.match("\\d+\\.\\s", "1. ")'),
    "empty": block(""),
    "null document": block("null", "json"),
    "JSON": block('{"a": [1, 2.5e3, "\\u00e4", true, null]}', "json"),
    "a very long number": block("1" * 6000, "json"),
    "line separators in a text": block("x = 'a\u2028b\x0c'"),
    "CRLF": block("if x:\n    y()").replace("\n", "\r\n"),
    "other languages": block("let x = ;", "javascript") + block("SELECT FROM", "sql") + block("if if"[:2], ""),
    "nested too deeply": block("-" * 20000 + "1"),
    "JSON nested too deeply": block("[" * 100000 + "]" * 100000, "json"),
    "code inside a line": "Use ```python if``` there.",
}
BROKEN = {
    "no colon": (block("def f(x)\n    return x"), "python block 1 does not parse: line 1: expected ':'"),
    "cut off": (block("print(f(1)"), "python block 1 does not parse: line 1: '\\(' was never closed"),
    "fence never closed": ("```py\nx = [1,\n", r"python block 1 .*never closed"),
    "the second": (block("x = 1") + block("x = = 1"), "python block 2 does not parse: line 1: invalid syntax"),
    "null byte": (block("x = 1\x00"), "python block 1 .*null bytes"),
    "doctest": (block(">>> if x\n...     y\n"), "line 1: expected ':'"),
    "mixed indentation": (block("if x:\n    a()\n  b()"), "line 3: unindent"),
    "prose": (block("Just call the function twice."), "line 1: invalid syntax"),
    "JSON, trailing comma": (block('{"a": 1,}', "json"), "json block 1 does not parse: .*line 1 column"),
    "JSON, left out": (block('{"a": 1, ...}', "json"), "json block 1 .*line 1 column 10"),
    "JSON after Python": (block("x = 1") + block("{'a': 1}", "JSON"), "json block 1 .*double quotes"),
}


@pytest.mark.parametrize("response", PARSES.values(), ids=PARSES)
def test_code_that_parses_passes(response):
    assert code_still_parses(row("Fine."), row(response)) is None


@pytest.mark.parametrize(("response", "told"), BROKEN.values(), ids=BROKEN)
def test_code_that_does_not_parse_is_refused_in_the_parsers_words(response, told):
    for before in ("No code at all.", block("x = 1") + block("{}", "json")):
        assert re.search(told, code_still_parses(row(before), row(response)))


def test_what_was_broken_before_may_stay_broken_in_that_language_only():
    parent = row(block("if x") + block("{}", "json"))
    assert code_still_parses(parent, row(block("while y"))) is None
    assert code_still_parses(parent, row(block("while y") + block("{", "json"))).startswith("json block 1")


def test_broken_code_of_the_question_may_be_quoted():
    parent = row("A colon is missing.", "What is wrong here?", "if x\n    y()")
    quoted = block("if x\n    y()") + block("if x:\n    y()")
    assert code_still_parses(parent, {**parent, "response": quoted}) is None
    worse = block("if x\n    y()") + block("if x;\n    y()")
    assert code_still_parses(parent, {**parent, "response": worse}).startswith("python block 2")


def test_reading_code_says_nothing_and_heeds_no_warning_filter():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert code_still_parses(row("."), row(block('x = "\\d"\nassert (1, "a")\n1 is 1'))) is None


# ---- by name


def test_checks_go_by_name_and_the_first_complaint_wins():
    parent, rewrite = row(RAIN["de"], WEATHER["de"]), row(RAIN["en"] + block("if"), WEATHER["de"])
    assert set(CHECKS) == {"same_language", "code_still_parses"}
    for names in (["same_language", "code_still_parses"], ["code_still_parses", "same_language"]):
        assert all_of(names)(parent, rewrite) == CHECKS[names[0]](parent, rewrite) is not None
    assert all_of("code_still_parses")(parent, rewrite) == code_still_parses(parent, rewrite)
    assert all_of([])(parent, rewrite) is None
    assert all_of(list(CHECKS))(parent, parent) is None


def test_an_unknown_check_is_refused_beside_those_that_exist():
    with pytest.raises(ReflectError, match="no check 'same_langauge'; there are same_language, code_still_parses"):
        all_of(["same_langauge"])


@pytest.mark.parametrize("check", [*CHECKS.values(), all_of(list(CHECKS))])
def test_checks_can_be_pickled_and_hashed_before_and_after_use(check):
    before = Hasher.hash(check)
    check(row(RAIN["de"]), row(RAIN["en"]))
    assert pickle.loads(pickle.dumps(check))(row(RAIN["de"]), row(RAIN["de"])) is None
    assert Hasher.hash(check) == before
