#!/usr/bin/env bash
# On a machine with the GPU: its tests, the commands, the benchmarks. bash bench/run_all.sh DIR
set -uo pipefail
cd "$(dirname "$0")/.."
out=$1
mkdir -p "$out"
status=0
python3 -m pytest -m gpu -q 2>&1 | tee "$out/pytest.log" || status=1
python3 -m g4attn_jax decode --config gemma-4-e2b gemma-4-12b gemma-4-31b --batch 8 \
  --prompt-len 1024 --steps 64 | tee "$out/decode.log" || status=1
python3 -m g4attn_jax check > "$out/check.log" || status=1
tail -n 1 "$out/check.log"
python3 -m bench.qkv_norm --out "$out" || status=1
python3 -m bench.tune_qkv_norm --out "$out" || status=1
exit $status
