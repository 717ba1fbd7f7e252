#!/usr/bin/env bash
# On a machine with the GPU: the GPU tests, the commands, the benchmarks.
#   bash bench/run_all.sh [DIR]     results and logs go to DIR, bench/results/h200 by default
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results/h200}
mkdir -p "$out"
status=0
python3 -m tests.gpu --all || status=1
python3 -m g4attn_jax decode --config gemma-4-e2b gemma-4-31b --batch 8 --steps 50 || status=1
python3 -m g4attn_jax check --all || status=1
for config in gemma-4-e2b gemma-4-e4b gemma-4-12b gemma-4-26b-a4b gemma-4-31b; do
  python3 -m g4attn_jax generate --random-weights --config "$config" || status=1
done
python3 -m g4attn_jax generate --random-weights --config gemma-4-31b --prompt-len 32768 || status=1
python3 -m bench.qkv_norm --out "$out" || status=1
python3 -m bench.tune_qkv_norm --out "$out" || status=1
python3 -m bench.qkv_prologue --out "$out" || status=1
python3 -m bench.tune_qkv_prologue --out "$out" || status=1
python3 -m bench.decode_attention --out "$out" || status=1
python3 -m bench.tune_decode_attention --out "$out" || status=1
python3 -m bench.prefill_attention --out "$out" || status=1
python3 -m bench.tune_prefill_attention --out "$out" || status=1
python3 -m bench.grouped_matmul --out "$out" || status=1
python3 -m bench.tune_grouped_matmul --out "$out" || status=1
python3 -m bench.tune_linear --out "$out" || status=1
python3 -m bench.weight_reads --out "$out" || status=1
python3 -m bench.decode_step --out "$out" || status=1
python3 -m bench.speculative --out "$out" || status=1
exit $status
