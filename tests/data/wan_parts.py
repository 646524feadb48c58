"""Tiny networks of Wan2.1's kinds, with random weights, in the layout of a diffusers folder."""

import torch

from configs.schema import CodecConfig, TextConfig

CAPTIONS = [
    "a large rabbit on a meadow",
    "people ride bicycles in a street",
    "a wheel of gondolas behind a wall",
]
DIM, LENGTH = 24, 41


def wan_codec(folder, **changes):
    sizes = {"stride": 8, "time_stride": 4, "channels": 16}
    return CodecConfig(**{"name": "wan", "path": str(folder)} | sizes | changes)


def umt5(folder, **changes):
    sizes = {"dim": DIM, "length": LENGTH}
    return TextConfig(**{"name": "umt5", "path": str(folder)} | sizes | changes)


def write_vae(folder, **changes):
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    sizes = {"base_dim": 4, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1}
    AutoencoderKLWan(**sizes | changes).save_pretrained(folder / "vae")


def write_text(folder):
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_kv": 8, "num_heads": 3, "d_ff": 32, "num_layers": 2}
    UMT5EncoderModel(UMT5Config(d_model=DIM, **sizes)).save_pretrained(folder / "text_encoder")
    trained_tokenizer().save_pretrained(folder / "tokenizer")


def trained_tokenizer(end="$A </s>"):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CAPTIONS * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=end, special_tokens=[("</s>", 1)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
