#!/bin/sh
# Expected: a kernel of exactly 384 threads a block (`.reqntid 384, 1, 1`) keeps its `setmaxnreg`; so does one that is
#   compiled with --maxrregcount; and what ptxas must drop it reports as a warning, which -Werror makes an error.
# Happens: a block size alone, even a required one, is not enough: `.minnctapersm` or `.maxnreg` must be there too.
#   --maxrregcount saves the kernel without a block size and not the ones with it: to add `.reqntid` loses the
#   instruction. ptxas exits with 0 each time and prints an info line (C7508) that -Werror lets pass.
# Seen: ptxas 13.0.88 and 13.5.37, sm_90a, the same from both, exit code 0 under -Werror:
#   "(C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register count at entry."
#   USETMAXREG in the SASS: no directive 0, maxntid 0, reqntid 0, maxntid and minnctapersm 1, reqntid and
#   minnctapersm 1, maxnreg 1; with --maxrregcount 168: 1, 0, 0, 1, 1, 1
# Why it matters: warp specialised kernels of Hopper move registers from the producer to the consumers with it. The
#   PTX ISA calls it a hint, so results stay right; only time, or the SASS, shows that it is gone. Known in part:
#   NVIDIA/cutlass#3406 (no launch bound); -Werror and the interplay with a block size are not told there.
# Needs: python3 with venv and pip, about 500 MB of disk, a minute. No GPU.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat >"$dir/kernels.ptx" <<'END'
.version 8.3
.target sm_90a
.address_size 64
END
kernel() { # name, directives
    cat >>"$dir/kernels.ptx" <<END
.visible .entry $1() $2
{
    setmaxnreg.dec.sync.aligned.u32 24;
    ret;
}
END
}
kernel none ''
kernel maxntid '.maxntid 384, 1, 1'
kernel reqntid '.reqntid 384, 1, 1'
kernel maxntid_minnctapersm '.maxntid 384, 1, 1 .minnctapersm 1'
kernel reqntid_minnctapersm '.reqntid 384, 1, 1 .minnctapersm 1'
kernel maxnreg '.maxnreg 168'

changed=
check() { # version, what is said of the options, the kernels that lose the instruction, options
    version=$1 label=$2 dropped=$3
    shift 3
    if ! "$bin/ptxas" -Werror -arch=sm_90a "$@" -o "$dir/kernels.cubin" "$dir/kernels.ptx" 2>"$dir/log"; then
        cat "$dir/log" >&2
        echo "Changed: ptxas $version refuses to drop setmaxnreg under -Werror." >&2
        exit 1
    fi
    sort -u "$dir/log"
    "$bin/nvdisasm" -c "$dir/kernels.cubin" >"$dir/kernels.sass"
    for kernel in none maxntid reqntid maxntid_minnctapersm reqntid_minnctapersm maxnreg; do
        kept=$(sed -n "/^\.text\.$kernel:/,/EXIT/p" "$dir/kernels.sass" | grep -c USETMAXREG || true)
        echo "ptxas $version, $label, $kernel: $kept USETMAXREG"
        case " $dropped " in *" $kernel "*) expected=0 ;; *) expected=1 ;; esac
        [ "$kept" = "$expected" ] || changed="$changed $version/$label/$kernel"
    done
}
for version in 13.0.88 13.5.37; do
    python3 -m venv "$dir/$version"
    "$dir/$version/bin/pip" install -q --no-deps "nvidia-cuda-nvcc==$version" nvidia-cuda-nvdisasm==13.5.37
    bin=$(dirname "$(find "$dir/$version" -name ptxas)")
    check "$version" 'no option' 'none maxntid reqntid'
    check "$version" '--maxrregcount 168' 'maxntid reqntid' --maxrregcount 168
done
if [ -n "$changed" ]; then
    echo "Changed: setmaxnreg is kept or dropped otherwise than the head of this script says in$changed." >&2
    exit 1
fi
