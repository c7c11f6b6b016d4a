#!/usr/bin/env bash
# Every check and table of one GPU, in about 80 minutes: bash docs/gpu.sh FOLDER [SECONDS-OF-A-TABLE]
# Each part leaves NAME.md or NAME.txt, and NAME.log, in the folder. A part that fails is named, and the others run.
set -uo pipefail
out=${1:?"usage: bash docs/gpu.sh FOLDER [SECONDS-OF-A-TABLE]"}
seconds=${2:-540}
python=${PYTHON:-python}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu.sh: torch sees no CUDA device; install a CUDA build of torch on a machine with a GPU" >&2
    exit 2
}
mkdir -p "$out" || exit 2
failed=()

part() { # FILE COMMAND...
    local file=$1 log=$out/${1%.*}.log
    shift
    echo "gpu.sh: $file: $*"
    "$@" >"$out/$file" 2>"$log" || failed+=("$file")
}

measure() { # FILE ARGUMENTS OF THE PROFILER...
    local file=$1
    shift
    part "$file" "$python" -m sgconvnext.profile "$@" --seconds "$seconds" --markdown
}

race="--run eager compiled --dtype bf16 --channels-last --round-seconds 1"
train="run.device=cuda run.precision=bf16 run.cudnn_benchmark=false epochs=4"
same='import sys, torch
a, b = (torch.load(f"{folder}/last.pth", "cpu", weights_only=True)["state_dict"] for folder in sys.argv[1:])
sys.exit(not all(torch.equal(a[name], b[name]) for name in a))'

part device.txt nvidia-smi
for run in triton triton_again; do
    part "$run.txt" "$python" -m pytest -q tests/longconv/test_triton.py tests/longconv/test_triton_block.py
done
for size in tiny large; do
    measure "ops_$size.md" ops "sgconvnext_$size" --dtype bf16 --batch 128 --channels-last
    measure "inference_$size.md" throughput "convnext_$size" "sgconvnext_$size" $race --batch 256
    measure "training_$size.md" throughput "convnext_$size" "sgconvnext_$size" $race --mode training --batch 128
done
measure tiles.md tiles
measure signals.md signals --dtype bf16
part generation.md "$python" -m sgconvnext.profile generation --markdown
part tune.txt "$python" -m sgconvnext.profile tune sgconvnext_tiny --dtype bf16 --channels-last --batch 128 \
    --save "$out/tuned.json"

# a run that is killed in its second epoch, and resumed, ends with the weights of one that was not
part whole.txt "$python" train.py configs/digits.yaml $train out="$out/whole"
"$python" train.py configs/digits.yaml $train out="$out/killed" &>"$out/killed.log" &
until grep -q "^epoch 1 " "$out/killed.log" || ! kill -0 $!; do sleep 0.2; done 2>/dev/null
kill -KILL $! 2>/dev/null
wait $! 2>/dev/null
part resumed.txt "$python" train.py configs/digits.yaml $train out="$out/killed" resume=auto
part same.txt "$python" -c "$same" "$out/whole" "$out/killed"

if [ ${#failed[@]} != 0 ]; then
    echo "gpu.sh: FAILED: ${failed[*]}; see the .log of each in $out" >&2
    exit 1
fi
echo "gpu.sh: all parts are in $out"
