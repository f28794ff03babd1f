"""The table of test_bad_input.py: inputs that cannot be used, by what reads them.

A row is an input, the value that the sentence names, and what it says was expected or
is to be done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_ppd.trees.bigram import BigramTable

NAN = float("nan")
CUT, FOLDER, GONE = object(), object(), object()  # what can become of a file
TABLE = torch.ones(3, 2, 32)  # three prompt tokens with two EPT
ROWS = TABLE.reshape(6, 32)
WHOLE = "expected a whole number from 1 to 128, or leave it out"
AS_TRAINED = "pass a folder that vllm-ppd train or convert wrote"
CALIBRATE = "with vllm-ppd calibrate, or remove it"
AGAIN = "measure again with vllm-ppd profile"


def entries(change: Callable[[list], Any]) -> Callable[[dict], Any]:
    return lambda menus: change(menus["fixed_rows"])


def entry(change: Callable[[dict], Any]) -> Callable[[dict], Any]:
    return entries(lambda all_entries: change(all_entries[0]))


def policy(**changes: Any) -> Callable[[dict], Any]:
    return entry(lambda first: first["policies"][0].update(changes))


def one_tree(*fields: list[int]) -> Callable[[dict], Any]:
    tree = dict(zip(("parents", "ranks", "prompts"), fields, strict=True))
    return policy(trees=[tree] * 3)


def any_json(what_to_do: str) -> list[tuple[Any, str, str]]:
    """What any JSON file of this project's formats can be."""
    return [
        ("{", "cannot be read as JSON", what_to_do),
        ("[" * 100_000, "cannot be read as JSON", what_to_do),
        (FOLDER, "Is a directory", what_to_do),
        ("[1]", "is no JSON object", what_to_do),
        ('{"format": "a"}', "expected an object with format 'ppd", what_to_do),
        ({"format_version": 9}, "format_version is 9; this release", what_to_do),
        ({"format_version": True}, "format_version is True; this", what_to_do),
        ({"zzz": 1}, "unknown key 'zzz'; expected", what_to_do),
    ]


# Heading: rows of (input, value, what to do).
BAD: dict[str, list[tuple[Any, str, str]]] = {
    "speculative_config": [
        ({"model": 3}, "path is 3", "expected a folder or a hub id of"),
        ({"model": ""}, "path is ''", "as in speculative_config={"),
        ({"num_speculative_tokens": 0}, "is 0", "from 1 to 128, or leave it out"),
        ({"num_speculative_tokens": 129}, "is 129", "from 1 to 128, or leave it"),
        ({"num_speculative_tokens": "7"}, "is '7'", WHOLE),
        ({"num_speculative_tokens": 2.5}, "is 2.5", WHOLE),
        ({"num_speculative_tokens": True}, "is True", WHOLE),
        ({"tree": 3}, "tree is 3", "expected a file's path"),
        ({"profile": ""}, "profile is ''", "expected 'auto', 'measure', 'none' or a"),
        ({"measure_seconds": 0}, "measure_seconds is 0", "expected a number above 0"),
        ({"measure_seconds": NAN}, "measure_seconds is nan", "expected a number above"),
        ({"bigram": None}, "bigram is None", "expected true or false"),
        ({"ngram": "yes"}, "ngram is 'yes'", "expected true or false"),
        ({"online": 1}, "online is 1", "expected true or false"),
        ({"tre": "f"}, "unknown key 'tre'", "did you mean 'tree'?"),
        ({"quantization": "fp8"}, "unknown key 'quantization'", "expected ['num_spec"),
    ],
    "vLLM's version": [
        (version, f"this is vLLM {version}", "install one of those")
        for version in ("0.31.2", "0.34.0", "1.0", "dev")
    ],
    "vLLM's settings": [
        ({"runner_type": "pooling"}, "runner 'pooling'", "generative models only"),
        ({"is_encoder_decoder": True}, "encoder-decoder", "serve it without PPD"),
        ({"is_diffusion": True}, "a diffusion model", "serve it without PPD"),
        ({"use_mla": True}, "MLA attention", "serve it without PPD"),
        ({"is_hybrid": True}, "Mamba, linear", "serve it without PPD"),
        ({"uses_alibi": True}, "ALiBi positions", "serve it without PPD"),
        ({"uses_mrope": True}, "M-RoPE positions", "serve it without PPD"),
        ({"is_multimodal_model": True}, "a multimodal model", "serve its text-only"),
        ({"rswa_window": 8}, "reference sliding", "serve it without PPD"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds", "leave it out"),
        ({"decode_context_parallel_size": 2}, "context parallelism", "leave it at 1"),
        ({"prefill_context_parallel_size": 2}, "context parallel", "leave it at 1"),
        ({"enable_dbo": True}, "--enable-dbo", "leave it out"),
        ({"kv_transfer_config": {}}, "--kv-transfer-config", "leave it out"),
        ({"ec_transfer_config": {}}, "--ec-transfer-config", "leave it out"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast", "leave it out"),
        ({"watermark_config": {1: 1}}, "output watermarking", "leave it out"),
        ({"return_sampling_mask": True}, "--return-sampling-mask", "leave it out"),
        ({"enable_batch_sharded_sampling": 1}, "--enable-batch-sh", "leave it out"),
        ({"worker_cls": "a.B"}, "--worker-cls a.B", "leave it out"),
        ({"attention_backend": "FLASH_ATTN"}, "FLASH_ATTN", "leave out --attention-b"),
        ({"backend": "triton_attn"}, "TRITON_ATTN", "leave out --attention-backend"),
        ({"per_kind": {"a": "FLEX"}}, "FLEX", "and backend_per_kind"),
    ],
    "the machine": [
        (("tpu", "X86", "0"), "not on 'tpu'", "runs on CPU and CUDA"),
        (("cpu", "ARM", "0"), "this is ARM", "serve without PPD"),
        (("cuda", "X86", "0"), "VLLM_USE_V2_MODEL_RUNNER=0", "unset the variable and"),
    ],
    "a path": [
        ("/no/folder", "no folder '/no/folder'", "check the path"),
        ("owner/prompts", "no route to host", "check the name and the network, or"),
        ("{data}", "text.jsonl' is a file", "expected a folder or a hub"),
    ],
    "prompt tokens": [
        ("nowhere", "no prompt-token folder", AS_TRAINED),
        ("empty", "is empty", "expected a prompt-token folder with config.json and"),
        ("data", "text.jsonl' is a file", "expected the folder that holds"),
    ],
    "config.json": [
        *any_json(AS_TRAINED),
        (GONE, "has no config.json", "expected a prompt-token folder with"),
        ('{"architectures": ["Llama"]}', "it is not the config", AS_TRAINED),
        ({"num_ep": 2}, "unknown key 'num_ep'", "did you mean 'num_ept'?"),
        ({"num_ept": ...}, "'num_ept' is missing", AS_TRAINED),
        ({"num_ept": "1"}, "[2, '1', 32]", "do not belong together"),
        ({"num_ept": 2}, "[2, 2, 32]", "do not belong together"),
        ({"num_prompt_tokens": 3}, "[3, 1, 32]", "do not belong together"),
        ({"hidden_size": 16}, "[2, 1, 16]", "do not belong together"),
        ({"base_model": "org/a"}, "base_model is 'org/a'", "expected an object"),
        ({"base_model": {"hiden": 2}}, "key 'hiden'", "did you mean 'hidden_size'?"),
        ({"base_model": {"vocab_size": ...}}, "'vocab_size' is missing", AS_TRAINED),
        ({"base_model": {"vocab_size": None}}, "vocab_size of the", AS_TRAINED),
        ({"base_model": {"architecture": None}}, "architecture of the", AS_TRAINED),
        ({"base_model": {"hidden_size": 8}}, "32 wide", AS_TRAINED),
        ({"base_model": {"hidden_size": 32.0}}, "is 32.0", "expected a positive int"),
        ({"base_model": {"name": None}}, "name of the base model is None", "expected"),
        ({"base_model": {"revision": 3}}, "revision of the base model is 3", "a name"),
        ({"base_model": {"embedding_signs": "0x"}}, "is '0x'", "expected hexadecimal"),
    ],
    "prompt_tokens.safetensors": [
        (CUT, "is not a readable safetensors file", "copy it again"),
        ("\xff" * 40, "is not a readable safetensors file", "copy it again"),
        (GONE, "no prompt_tokens.safetensors", "copy the whole folder"),
        (FOLDER, "no prompt_tokens.safetensors", "copy the whole folder"),
        ({"a": ROWS}, "the tensors ['a']", "expected 'embeddings' alone"),
        ({"embeddings": ROWS}, "[6, 32]", "do not belong together"),
        ({"embeddings": ROWS[:2].int().reshape(2, 1, 32)}, "torch.int32", "expected a"),
        ({"embeddings": TABLE[:2, :1] * NAN}, "token 1 (EPT 0) hold NaN", AS_TRAINED),
    ],
    "another model": [
        ({"hidden_size": 16}, "hidden size 16 instead of 32", "use prompt tokens"),
        ({"vocab_size": 301}, "vocabulary size 301 instead of 257", "use prompt tok"),
        ({"architecture": "B"}, "architecture B instead of Llama", "use prompt tokens"),
        ({"embedding_signs": "b" * 512}, "of its signs differ", "use prompt tokens"),
    ],
    "a model's config.json": [
        ("{", "cannot be read as JSON", "expected a Hugging Face model folder"),
        ("[]", "is no JSON object", "expected a Hugging Face model folder"),
        (FOLDER, "Is a directory", "expected a Hugging Face model folder"),
        (GONE, "no config.json", "expected a Hugging Face model folder"),
        ({"vocab_size": ...}, "no positive vocab_size", "a language model?"),
        ({"hidden_size": "8"}, "no positive hidden_size", "a language model?"),
        ({"architectures": None}, "architectures is None", "is it a model's folder?"),
    ],
    "a model's model.safetensors": [
        ("short", "is not a readable safetensors file", "download the model again"),
        (CUT, "is not a readable safetensors file", "download the model again"),
    ],
    "adapter_config.json": [
        ("{", "cannot be read as JSON", "restore the file"),
        ("[]", "is no JSON object", "restore the file"),
        ({"peft_type": "LORA"}, "a LORA adapter", "expected prompt tokens"),
        ({"num_special_tokens": ...}, "lacks 'num_special_tokens'", "ordinary prompt"),
        ({"num_special_tokens": 2}, "2 prompt tokens of 2 EPT", "not belong together"),
        ({"num_special_tokens": "3"}, "is '3'", "expected a positive integer"),
        ({"virtual_tokens_per_special_token": 0}, "is 0", "expected a positive"),
        ({"num_virtual_tokens": 5}, "num_virtual_tokens 5", "make it 6; restore the"),
        ({"token_dim": 8}, "token_dim 8", "make it 32; restore the file"),
        ({"num_exits": 2}, "num_exits 2", "expected 1"),
        ({"aggregation_type": "weighted"}, "'weighted'", "expected 'mean'"),
        ({"vt_attention_type": "decoder"}, "'decoder'", "expected ensemble"),
        ({"vt_attention_type": ...}, "'decoder' with 3 prompt", "expected ensemble"),
    ],
    "adapter_model.safetensors": [
        ({"prompt_embeddings": TABLE}, "[3, 2, 32]", "do not belong together"),
        ({"prompt_embeddings": ROWS, "b": ROWS[0]}, "'b'", "'prompt_embeddings' alone"),
        ({"prompt_embeddings": ROWS * NAN}, "NaN", AS_TRAINED),
        ("\xff" * 50, "is not a readable checkpoint", "copy it again"),
        (GONE, "neither adapter_model.safetensors nor", "copy the whole folder"),
    ],
    "adapter_model.bin": [
        (CUT, "adapter_model.bin is", "again"),
        ("", "is not a readable checkpoint", "copy it again"),
        ([ROWS], "holds list", "expected the tensor 'prompt_embeddings' alone"),
    ],
    "acceptance.json": [
        *any_json(CALIBRATE),
        ({"transition": 1}, "'transition'", "did you mean 'transitions'?"),
        ({"ngram": [[1.5, 0.2], [0.1, 0.1]]}, "ngram holds values outside", CALIBRATE),
        ({"unprompted": [0.1]}, "unprompted has shape [1]", CALIBRATE),
        ({"overall": [[0.1, 0.1, 0.1]]}, "overall has shape [1, 3]", CALIBRATE),
        ({"marginal": [[0.1, 0.1]]}, "marginal has shape [1, 2]", CALIBRATE),
        ({"marginal": [["a"]]}, "marginal is not a table of numbers", CALIBRATE),
        ({"marginal": [[0.5], [1.0001]]}, "marginal holds values outside", CALIBRATE),
        ({"marginal": [[0, 0], [0.6, 0.6]]}, "marginal[1] sums to 1.2", CALIBRATE),
        ({"prompted": 0.5}, "not enough values", CALIBRATE),
        ({"transitions": [[1, 1], [0, 1]]}, "transitions has shape", CALIBRATE),
        ({"transitions": [[[0.5] * 3] * 3] * 2}, "must sum to 1", CALIBRATE),
    ],
    "trees.json": [
        *any_json(CALIBRATE),
        (entries(list.clear), "needs at least one entry", CALIBRATE),
        (entries(list.reverse), "must rise, not [5, ", CALIBRATE),
        (entries(lambda e: e.append(e[-1])), "must rise, not [", CALIBRATE),
        (entries(lambda e: e.append(3)), "must be an object, not int", CALIBRATE),
        (entry(lambda e: e.pop("policies")), "'policies' is missing", CALIBRATE),
        (entry(lambda e: e.update(polices=1)), "'polices'", "mean 'policies'?"),
        (entry(lambda e: e.update(policies=[])), "one policy", CALIBRATE),
        (entry(lambda e: e["policies"].pop()), "number of match classes", CALIBRATE),
        (entry(lambda e: e.update(acceptance_length=0)), "is 0", CALIBRATE),
        (entry(lambda e: e.update(acceptance_length="1")), "'str'", CALIBRATE),
        (entry(lambda e: e.update(row_shares=[[2, 0.5]])), "sum to 1", CALIBRATE),
        (entry(lambda e: e.update(row_shares=[2])), "cannot be used", CALIBRATE),
        (policy(format_version=2), "format_version is 2; this", CALIBRATE),
        (policy(format="x"), "with format 'ppd_tree_policy', not 'x'", CALIBRATE),
        (policy(shape=1), "unknown key 'shape'", CALIBRATE),
        (policy(trees={}), "'trees' must be a list", CALIBRATE),
        (policy(trees=[3, 4]), "must be an object, not int", CALIBRATE),
        (policy(trees=[{"parent": []}] * 3), "tree 0: unknown key", "an 'parents'?"),
        (policy(trees=[{"parents": []}] * 3), "'ranks' is missing", CALIBRATE),
        (one_tree([1], [0], [1, 1]), "has parent 1", "must be an earlier node"),
        (one_tree([0, 0], [0, 0], [1, 1, 1]), "the same rank", CALIBRATE),
        (one_tree([0], [0, 1], [1, 1]), "needs 1 ranks", CALIBRATE),
        (one_tree([0], [0], [1]), "needs 1 ranks and 2 prompt counts", CALIBRATE),
        (one_tree([0], [-1], [1, 1]), "must not be negative", CALIBRATE),
        (policy(num_ept=2), "same prompt tokens", CALIBRATE),
        (policy(num_ept=0), "num_ept is 0", "at least 1"),
        (policy(num_ept="one"), "not supported between", CALIBRATE),
    ],
    "profile.json": [
        *any_json(AGAIN),
        ({"row": 1}, "unknown key 'row'", "did you mean 'rows'?"),
        ({"rows": [2, 4]}, "rows of a profile are [2, 4]", "expected rising from 1"),
        ({"rows": 3}, "not iterable", "measure again with vllm-ppd profile"),
        ({"num_running": [1]}, "[2, 2] times", "expected 1 rows of 2"),
        ({"seconds": [[1, 2]]}, "[2] times", "expected 2 rows of 2"),
        ({"seconds": [[1, 2], [1, -1]]}, "finite and positive", "measure again"),
        ({"seconds": [[1, 2], [1, "fast"]]}, "'fast'", "measure again"),
        ({"key": 3}, "key of a profile is 3", "expected an object"),
        ({"key": {"model": "b"}}, "with model 'b'", "measure again"),
    ],
    "bigram.safetensors": [
        (CUT, "bigram.safetensors cannot be used", CALIBRATE),
        (GONE, "No such file", CALIBRATE),
        (FOLDER, "bigram.safetensors cannot be used", CALIBRATE),
        ({"ids": ROWS}, "its format is None", "expected 'ppd_bigram' version 1"),
        (BigramTable.empty(7, 3, (1.0, 1.0)), "is for 7 tokens and 2", CALIBRATE),
        (BigramTable.empty(6, 3, (1.0,)), "for 6 tokens and 1 prompt", CALIBRATE),
    ],
    "text.jsonl": [
        (GONE, "No such file", "check the path"),
        (FOLDER, "is a folder", "expected a .jsonl or text file"),
        ("\n\n", "holds no text", "expected at least one document"),
        ('{"text": "short"}', "gives 6 tokens", "expected at least 24: use more text"),
        ('{"text": "\xff\xfe"}', "line 1 cannot be read", "expected UTF-8 text"),
        ('{"text": "a"', "line 1 cannot be read", "one JSON object on every line"),
        ('{"body": "a"}', 'line 1 has neither "text"', "expected one of them on every"),
        ('{"text": "a"}\n{"text": 3}', "line 2 has neither", "expected one of them"),
        ("[1]", "line 1 has neither", "expected one of them on every line"),
        ('{"messages": ["hi"]}', "line 1 has neither", "expected one of them"),
    ],
    "demo": [
        ("--max-tokens 0", "max_tokens is 0", "number of at least 1"),
        ("--max-tokens many", "'many'", "--max-tokens: invalid int value"),
        ("--temperature -1", "temperature is -1", "expected 0 (greedy) or above"),
        ("--temperature nan", "temperature is nan", "expected 0 (greedy) or above"),
        ("--dtype int8", "'int8'", "choose from"),
        ("--prompt=", "--prompt is ''", "expected a question or"),
        ("--model /no --prompts /", "there is no folder '/no'", "check the path"),
        ("--model {model} --prompts /no", "no folder '/no'", "check the path"),
    ],
    "inspect": [
        ("", "the following arguments are required", "path"),
        ("{model}", "is not the configuration of prompt tokens", AS_TRAINED),
        ("/no", "no folder '/no'", "check the path"),
        ("{prompts} --model /no", "no folder '/no'", "check the path"),
        ("{prompts} --model {prompts}", "no positive vocab_size", "a language model?"),
    ],
    "convert": [
        ("{prompts} {data}", "text.jsonl is a file", "expected a folder to write into"),
        ("{prompts} /proc/x", "cannot be written to /proc/x", "choose another folder"),
        ("{prompts} {model}", "already has config.json", "choose another folder"),
        ("{theirs} {out}", "'lmsys/vicuna-tiny'", "hub id with --model"),
        ("{narrow} {out} --model {model}", "size 32 instead of 16", "use prompt"),
        ("{theirs} {prompts} --model {model}", "already has config.json", "overwrit"),
        ("{theirs} {theirs} --model {model}", "is a PEFT checkpoint", "choose another"),
        ("{prompts} {prompts} --overwrite", "already has config.json", "choose an"),
        ("{prompts} {theirs}", "already has adapter_config.json", "with --overwrite"),
        ("{prompts} {lora} --overwrite", "a LORA adapter", "expected prompt tokens"),
        ("/no {out}", "no folder '/no'", "check the path"),
    ],
    "profile": [
        ("{model} {prompts} --engine fp8", "'fp8'", "expected KEY=VALUE, such as"),
        ("{model} {prompts} --engine =fp8", "'=fp8'", "expected KEY=VALUE, such as"),
        ("{model} {prompts} --engine model=b", "'model=b' sets what", "leave it out"),
        ("{model} {prompts} --engine a=1 a=2", "'a=2' sets what is", "leave it out"),
        ("{model} {prompts} --budget 0", "seconds is 0", "expected a number above 0"),
        ("{model} {prompts} --budget nan", "seconds is nan", "expected a number above"),
        ("{model} {prompts} --out .", "--out is .", "expected a file in an existing"),
        ("{model} {prompts} --out /no/a", "--out is /no/a", "expected a file in an ex"),
        ("{model} {prompts} --out {data}", "exists already", "choose another name, or"),
        ("/no {prompts}", "no folder '/no'", "check the path"),
        ("{model} {model}", "is not the configuration of prompt tokens", AS_TRAINED),
    ],
    "verify": [
        ("--concurrency 1 0", "concurrency is 0", "whole number of at least 1"),
        ("--prompts /no", "/no cannot be read", "check the path"),
        ("--ppd model=b", "'model=b' sets what", "leave it out"),
    ],
    "tree": [
        ("--no-ngram --no-bigram", "nothing to draft from", "vllm-ppd train"),
        ("{prompts} --max-draft-tokens 0", "is 0", "from 1 to 128, or leave it"),
        ("{prompts} --draw 1000", "--draw is 1000", "expected a draft length of the"),
        ("{prompts} --profile /no", "latency profile /no cannot be read", "measure ag"),
        ("{prompts} --tree /no", "the tree menu /no cannot be read", CALIBRATE),
        ("{prompts} --tree {menu}", "is for 3 prompt tokens", "write it again with"),
        ("{prompts} --device tpu", "'tpu'", "choose from"),
        ("/no", "no folder '/no'", "check the path"),
    ],
    "train": [
        ("", "steps is None", "expected exactly one of the two"),
        ("--data", "expected at least one argument", "--data"),
        ("--steps 4 --minutes 1", "minutes is 1.0", "exactly one of the"),
        ("--steps 0", "steps is 0", "a whole number of at least 1"),
        ("--minutes 0", "minutes is 0.0", "expected a number above 0"),
    ],
    "train --steps 4": [
        ("--points 0", "points is 0", "a whole number of at least 1"),
        ("--updates 0", "updates is 0", "a whole number of at least 1"),
        ("--num-ept 1.5", "'1.5'", "--num-ept: invalid int value"),
        ("--learning-rate -1", "learning_rate is -1", "expected a number ab"),
        ("--alpha 1.5", "alpha is 1.5", "expected above 0, at most 1"),
        ("--dtype int8", "'int8'", "choose from"),
        ("--length 3", "length is 3, too short", "expected at least 4"),
        ("--length 99", "length 99 exceeds the model's 64", "lower the len"),
        ("--evaluations -1", "evaluations is -1", "at least 0"),
        ("--evaluation-sequences 0", "evaluation_sequences is 0", "least 1"),
        ("--checkpoint-every 0", "checkpoint_every is 0", "at least 1"),
        ("--seed 99999999999999999999", "seed is 9999", "expected a whole"),
        ("--init /no", "no folder '/no'", "check the path"),
        ("--held-out {short}", "gives 10 tokens", "at least 24"),
        ("--out {data}", "is a file", "expected a folder to write into"),
        ("--out {data}/in", "cannot be made", "choose another folder"),
        ("--out {model}", "already has config.json", "choose another folder"),
        ("--out {model} --overwrite", "refusing to overwrite", AS_TRAINED),
        ("--out {theirs}", "is a PEFT checkpoint", "choose another folder"),
        ("--data {chats}", "4 tokens of the assistant", "with longer answers"),
        ("--model /no", "no folder '/no'", "check the path"),
        ("--model {data}", "is a file", "expected a folder or a hub"),
        ("--model {empty}", "no config.json", "expected a Hugging Face"),
        ("--model {no_weights}", "cannot be loaded", "expected its config.json and"),
        ("--model {no_tokenizer}", "no usable tokenizer", "expected its files beside"),
        ("--model {no_template} --data {chats}", "has no chat template", "use {"),
    ],
    "train --self-distill": [
        ("/no", "cannot be read: No such file", "check the path"),
        ("{void}", "holds no text", "expected at least one document"),
        ("{data}", "line 1 is no prompt", 'expected "prompt" (a string), "turns"'),
        ("{few}", "has 7 prompts", "expected 8, as some answers are held out"),
        ("{asks} --self-distill-tokens 0", "tokens is 0", "number of at least 1"),
        ("{asks} --model {no_template}", "has no chat template", "use {"),
        ("{asks} WORLD_SIZE=2", "--self-distill", "first without accelerate launch"),
    ],
    "calibrate": [
        ("--points 0", "points is 0", "a whole number of at least 1"),
        ("--temperature -1", "temperature is -1", "expected 0 (greedy) or above"),
        ("--temperature nan", "temperature is nan", "expected 0 (greedy) or above"),
        ("--bigram-entries -1", "bigram_entries is -1", "of at least 0"),
        ("--fixed-rows 1", "fixed_rows is 1, too few", "expected at least 2"),
        ("--fixed-rows 200", "fixed_rows is 200", "expected at most 129"),
        ("--continue 3", "continuation is 3, too few for 2", "expected at least 4"),
        ("--ranks 1000", "the vocabulary has 257 tokens", "expected at most 257"),
        ("--continue 60", "length 68 exceeds the model's 64", "lower the length"),
        ("--prompt-length 5000", "tokens; expected", "at least 5000: use more text"),
        ("--seed 99999999999999999999", "seed is 9999", "expected a whole number"),
        ("--out {nowhere}", "is no folder that can be written", "choose another one"),
        ("--data /no", "cannot be read: No such file", "check the path"),
        ("--model {no_template} --data {chats}", "has no chat template", "use {"),
        ("--model /no", "no folder '/no'", "check the path"),
    ],
}
