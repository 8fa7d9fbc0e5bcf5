"""Tiny tokenizers."""

from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Hello there, how can I help you today? I'd like a small coffee and two rolls, please.",
    "The answer is 42. What is the capital of France? Paris is the capital of France.",
    "You are a careful assistant. Answer in one sentence, and never in two!",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))  # three",
    "system user assistant tool [INST] and [/INST] <|im_start|> <|im_end|> ### :-) (yes) \"no\" 'so'",
]


def bpe_tokenizer(
    special: tuple[str, ...], eos: str, bos: str | None = None, ordinary: tuple[str, ...] = (), adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred tokens, which cuts texts as Llama-3 and Qwen do.

    It is kept as a file: trained again, it would differ from process to process.
    """
    core = Tokenizer.from_file(str(Path(__file__).with_name("toy_bpe.json")))
    core.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    core.add_tokens([AddedToken(name, normalized=False) for name in ordinary])
    if adds_bos and bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token=bos, pad_token=eos)


@cache
def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE with the marks of SentencePiece: '▁' before a text, byte fallback, <s> before every text."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = _spaces()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(name for name, _ in learned)]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    merges = [
        (name[:i], name[i:])
        for name, _ in learned
        for i in range(1, len(name))
        if name[:i] in vocabulary and name[i:] in vocabulary
    ]
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = _spaces()
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def _spaces() -> normalizers.Sequence:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
