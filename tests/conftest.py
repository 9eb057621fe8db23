import importlib.util
import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported

import datasets  # noqa: E402
import pytest  # noqa: E402
from endpoint import Endpoint, rewriting  # noqa: E402

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
    os.environ.pop(name, None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only fight
datasets.disable_progress_bars()
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # so in a script's background; children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent

ROWS = [
    {"instruction": "Name three rivers of Europe.", "input": "", "output": "The Danube, the Rhine and the Loire."},
    {"instruction": "Translate into French.", "input": "Good morning, my friend.", "output": "Bonjour, mon ami."},
    {"instruction": "Add the numbers.", "input": "17 and 25", "output": "42"},
    {"instruction": "Write a line about rain.", "input": "", "output": "Rain taps the roof like a patient visitor."},
    {"instruction": "Which is heavier, iron or cork?", "input": "", "output": "Iron, for the same volume."},
    {"instruction": "Give a synonym for quick.", "input": "", "output": "Fast."},
    {"instruction": "What does `len` do in Python?", "input": "", "output": "It returns the number of items."},
    {"instruction": "Suggest a breakfast.", "input": "no eggs", "output": "Porridge with apple and cinnamon."},
]


@pytest.fixture
def rows():
    """Eight Alpaca-style rows, written for these tests."""
    return datasets.Dataset.from_list(ROWS)


@pytest.fixture
def pairs(rows):
    from hf_reflect import to_pairs

    return to_pairs(rows)


@pytest.fixture
def endpoint():
    with Endpoint() as server:
        yield server


@pytest.fixture
def teacher(endpoint, tmp_path):
    from hf_reflect import Teacher

    return Teacher("teacher", base_url=endpoint.url, ledger=str(tmp_path / "ledger.sqlite"))


@pytest.fixture
def candidates(pairs):
    """All four versions of each row, from a callable teacher."""
    from hf_reflect import ReflectionTransform

    for part in ("instruction", "response"):
        transform = ReflectionTransform(scripted_teacher, part, source="scripted")
        pairs = pairs.map(transform, batched=True, load_from_cache_file=False)
    return pairs


def scripted_teacher(chats):
    from hf_reflect import Reply

    return [Reply(text=rewriting({"messages": chat}), finish_reason="stop") for chat in chats]


def load_recipe(monkeypatch, name):
    """A recipe as a module, in this process."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for their own
    spec.loader.exec_module(module)
    return module


@contextmanager
def chromium(downloads):
    """A headless Chromium, driven, that logs console and network and saves into this folder; skips where none is."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,800"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def byte_level_tokenizer(texts, size=400):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, size, special_tokens=["<s>", "</s>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def llama_style_tokenizer(texts, size=500):
    """As Llama 2's: SentencePiece BPE with byte fallback, a space before the text, BOS added."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special + pieces, show_progress=False)
    # words by themselves, since merges of SentencePiece do not cross spaces
    tokenizer.train_from_iterator((word for text in texts for word in text.split()), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(texts):
    """Byte-level BPE with a chat template that trims, ChatML's tokens, and no BOS."""
    tokenizer = byte_level_tokenizer(texts)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.bos_token = None
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_llama(vocabulary, seed=0, **settings):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 2048}
    config = LlamaConfig(vocab_size=vocabulary, **{**sizes, **settings})
    config.initializer_range = 0.2  # so that losses of an untrained model differ
    return LlamaForCausalLM(config).eval()


TEXTS = [text for row in ROWS for text in row.values()]


def tiny_student():
    tokenizer = byte_level_tokenizer(TEXTS)
    return tiny_llama(len(tokenizer)), tokenizer


@pytest.fixture(scope="session")
def student():
    """(model, tokenizer): an untrained Llama of a few thousand parameters, byte-level BPE."""
    return tiny_student()


@pytest.fixture(scope="session")
def reference():
    """The folder of real data and numbers; its licence keeps it out of this repository."""
    folder = os.environ.get("HF_REFLECT_REFERENCE")
    if not folder:
        pytest.skip("HF_REFLECT_REFERENCE names no folder with the reference data")
    return Path(folder)


@pytest.fixture(scope="session")
def alpaca_rows(reference):
    return json.loads((reference / "reference" / "alpaca_sample.json").read_text())


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory):
    """The same student, as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("student")
    for part in tiny_student():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """The folder of a Sentence-BERT model of a few thousand parameters, untrained: words, mean pooling."""
    import torch
    from sentence_transformers import SentenceTransformer, models
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = {word: n for n, word in enumerate(["<pad>", "<unk>", *sorted({w for t in TEXTS for w in t.split()})])}
    tokenizer = Tokenizer(kinds.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), initializer_range=0.5, **sizes)).save_pretrained(folder / "bert")
    fast.save_pretrained(folder / "bert")
    transformer = models.Transformer(str(folder / "bert"), max_seq_length=64)
    pooling = models.Pooling(transformer.get_embedding_dimension())
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder / "sbert"))
    return folder
