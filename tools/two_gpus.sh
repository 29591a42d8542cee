#!/usr/bin/env bash
# What docs/performance.md rests on, on a machine with two GPUs: measures step by step and keeps what there is already.
#
#   bash tools/two_gpus.sh [FOLDER] [STEP ...]       FOLDER: benchmarks/results; no STEP: all, in the order below
#
# Every step has a time limit; its output lies beside its result, as STEP.txt. Takes some 25 minutes on two H200s.
set -u
folder=${1:-benchmarks/results}
shift || true
mkdir -p "$folder"

step() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    if [ ${#wanted[@]} -gt 0 ] && [[ " ${wanted[*]} " != *" $name "* ]]; then return; fi
    if [ -e "$folder/$name.json" ]; then
        echo "$name: there already"
        return
    fi
    local start=$SECONDS
    timeout "$limit" "$@" --json "$folder/$name.json" >"$folder/$name.txt" 2>&1
    echo "$name: exit code $?, $((SECONDS - start)) s"
}

wanted=("$@")
overlap=(python3 -m antiphon.cli bench overlap)
prefill=(python3 -m tools.prefill_throughput)
serving() { # MODEL OPTION...: as the references measure theirs
    echo python3 -m antiphon.cli bench dbo "$@" --load-format dummy --routing uniform --ranks 2 --random-input-len 4096 \
        --random-output-len 1 --num-prompts 200 --max-concurrency 8 --max-model-len 8192 --no-prefix-caching
}
no_peers=(--transports allgather,host-staged --no-peer-access)
nvlink=(--transports allgather,copy-engine)
sizes=2048,4096,8192,16384

step overlap-qwen3-235b-a22b-no-peer-access 60 "${overlap[@]}" qwen3-235b-a22b --num-layers 12 --tokens 8192 --repeats 5 "${no_peers[@]}"
step overlap-deepseek-v3-no-peer-access 60 "${overlap[@]}" deepseek-v3 --num-layers 6 --tokens 8192 --repeats 5 "${no_peers[@]}"
step overlap-qwen3-30b-a3b-zipf-no-peer-access 60 "${overlap[@]}" qwen3-30b-a3b --routing zipf:1.0 --tokens 8192 --repeats 5 "${no_peers[@]}"
step prefill-glm-4.5-air-no-peer-access 120 "${prefill[@]}" glm-4.5-air --ranks 2 --prompts 32 --repeats 2 --no-peer-access
step prefill-glm-4.5-air-nvlink 120 "${prefill[@]}" glm-4.5-air --ranks 2 --prompts 32 --repeats 2
step overlap-qwen3-235b-a22b-nvlink 60 "${overlap[@]}" qwen3-235b-a22b --num-layers 12 --tokens 8192 --repeats 5 "${nvlink[@]}"
step overlap-deepseek-v3-nvlink 60 "${overlap[@]}" deepseek-v3 --num-layers 6 --tokens 8192 --repeats 5 "${nvlink[@]}"
step overlap-qwen3-30b-a3b-zipf-nvlink 60 "${overlap[@]}" qwen3-30b-a3b --routing zipf:1.0 --tokens 8192 --repeats 5 "${nvlink[@]}"
step overlap-qwen3-30b-a3b-no-peer-access 120 "${overlap[@]}" qwen3-30b-a3b --tokens $sizes --repeats 5 "${no_peers[@]}"
step overlap-qwen3-30b-a3b-nvlink 120 "${overlap[@]}" qwen3-30b-a3b --tokens $sizes --repeats 5 --transports allgather,nccl-zero-cta,copy-engine
step overlap-glm-4.5-air-no-peer-access 90 "${overlap[@]}" glm-4.5-air --tokens 8192 --repeats 4 "${no_peers[@]}"
step overlap-glm-4.5-air-nvlink 90 "${overlap[@]}" glm-4.5-air --tokens 8192 --repeats 4 "${nvlink[@]}"
step overlap-deepseek-v2-lite-no-peer-access 60 "${overlap[@]}" deepseek-v2-lite --tokens 8192 --repeats 15 "${no_peers[@]}"
step overlap-deepseek-v2-lite-nvlink 60 "${overlap[@]}" deepseek-v2-lite --tokens 8192 --repeats 5 "${nvlink[@]}"
step overlap-qwen3-30b-a3b-alltoall-no-peer-access 60 "${overlap[@]}" qwen3-30b-a3b --tokens 8192 --repeats 5 --transports allgather,alltoall,host-staged --no-peer-access
step overlap-qwen3-30b-a3b-alltoall-nvlink 60 "${overlap[@]}" qwen3-30b-a3b --tokens 8192 --repeats 5 --transports allgather,alltoall,allgather:16ctas,copy-engine
step overlap-qwen3-30b-a3b-512-no-peer-access 60 "${overlap[@]}" qwen3-30b-a3b --tokens 512 --repeats 5 "${no_peers[@]}"
step overlap-qwen3-30b-a3b-512-nvlink 60 "${overlap[@]}" qwen3-30b-a3b --tokens 512 --repeats 5 "${nvlink[@]}"
step comm-nvlink 90 python3 -m antiphon.cli bench comm --sizes 4K,64K,1M,16M,64M,256M,512M --beside-from 256M --repeats 5 \
    --transports allgather,nccl-zero-cta,copy-engine,host-staged
step prefill-qwen3-30b-a3b-one-gpu 60 "${prefill[@]}" qwen3-30b-a3b --ranks 1 --repeats 2
step prefill-qwen3-30b-a3b-no-peer-access 90 "${prefill[@]}" qwen3-30b-a3b --ranks 2 --repeats 2 --no-peer-access
step prefill-qwen3-30b-a3b-nvlink 90 "${prefill[@]}" qwen3-30b-a3b --ranks 2 --repeats 2
step serving-qwen3-30b-a3b-no-peer-access 120 $(serving qwen3-30b-a3b --repeats 2 --no-peer-access)
step serving-qwen3-30b-a3b-nvlink 120 $(serving qwen3-30b-a3b --repeats 2)
step serving-http-qwen3-30b-a3b-no-peer-access 400 python3 -m tools.serve_by_turns qwen3-30b-a3b --vocab-size 151000 \
    --ranks 2 --load-format dummy --routing uniform --max-model-len 8192 --no-prefix-caching --no-peer-access
step serving-glm-4.5-air-no-peer-access 240 $(serving glm-4.5-air --repeats 1 --no-peer-access)
step serving-glm-4.5-air-nvlink 240 $(serving glm-4.5-air --repeats 1)
step serving-qwen3-30b-a3b-alltoall-no-peer-access 150 $(serving qwen3-30b-a3b --repeats 2 --transport alltoall --no-peer-access)
step serving-qwen3-30b-a3b-alltoall-nvlink 120 $(serving qwen3-30b-a3b --repeats 2 --transport alltoall)
step serving-qwen3-30b-a3b-rate-no-peer-access 180 $(serving qwen3-30b-a3b --repeats 2 --capacity-share 1.2 --no-peer-access)
step serving-qwen3-30b-a3b-rate-nvlink 150 $(serving qwen3-30b-a3b --repeats 2 --capacity-share 1.2)
