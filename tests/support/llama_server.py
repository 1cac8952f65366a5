"""
llama.cpp's server as a program: `python llama_server.py --port 8080 --ctx-size 512 --parallel 1 --api-key KEY`.

Runs under an interpreter of its own with the packages `xllamacpp` (llama.cpp's server as a wheel) and `gguf`; neither
is among the project's dependencies.  The model is made on the spot: a llama of two layers with random weights, whose
vocabulary is the 256 bytes and some words.  So its answers mean nothing.  It never says a byte above 127: llama.cpp's
streams leave out what is left of a character at their end, and its whole answers do not.
"""

import argparse
import tempfile
import threading
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

BYTES = 3
"""Tokens before that of byte 0."""
LAYERS, WIDTH, HEADS, INNER, CONTEXT = 2, 64, 4, 128, 4096
WORDS = ("▁", "▁hi", "▁there", "▁one", "▁two", "▁three", "é", "☃", "▁word", "▁say", ".", ",", "\n")
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_model(path: Path) -> None:
    """Write a tiny model with random weights, the same at each call."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    kind = gguf.TokenType
    tokens = [("<unk>", kind.UNKNOWN), ("<s>", kind.CONTROL), ("</s>", kind.CONTROL)]
    tokens += [(f"<0x{byte:02X}>", kind.BYTE) for byte in range(256)]
    tokens += [(word, kind.NORMAL) for word in WORDS]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, *shape: int) -> None:
        weights = rng.normal(0.0, 0.4, shape) if len(shape) > 1 else np.ones(shape)
        if name == "output.weight":
            weights[BYTES + 128 : BYTES + 256] = 0.0
        writer.add_tensor(name, weights.astype(np.float32))

    add("token_embd.weight", len(tokens), WIDTH)
    add("output_norm.weight", WIDTH)
    add("output.weight", len(tokens), WIDTH)
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", WIDTH)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_gate.weight", INNER, WIDTH)
        add(f"blk.{layer}.ffn_up.weight", INNER, WIDTH)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Serve until the process is stopped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ctx-size", type=int, default=512)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--api-key", required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "random.gguf"
        write_model(model)
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(model)
        parameters.model_alias = {"m"}
        parameters.hostnames = [options.host]
        parameters.port = options.port
        parameters.n_ctx = options.ctx_size
        parameters.n_parallel = options.parallel
        parameters.api_keys = [options.api_key]
        parameters.warmup = False
        server = xllamacpp.Server(parameters)
        print("listening at", server.listening_address, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
