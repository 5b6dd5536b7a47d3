//! Calls that are wrong: each is an error that says what was found, what is allowed and how to mend
//! it.

mod common;

use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Result, Shape, Tensor};
use common::{device, rows};
use framestride_candle::{Attention, HeadTypes, Norm, Rope, Spec, Text};

/// A tensor of a shape that its storage does not have. candle makes it without a question.
fn too_short(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    let real = Tensor::zeros(shape.elem_count() - 1, dtype, device)?;
    let (storage, layout) = real.storage_and_layout();
    Ok(Tensor::from_storage(storage.try_clone(layout)?, shape, BackpropOp::none(), false))
}

fn load(name: &str) -> Result<Attention> {
    Attention::load(&device()?, &Spec::shipped(name).expect("it is shipped"))
}

/// Expects the error of a call: what was found, what is allowed, and the mend. candle adds a
/// backtrace where the environment asks for one.
fn expect(call: Result<Tensor>, [found, allowed, mend]: [&str; 3]) {
    let error = call.map(|out| format!("{out:?}")).expect_err("the call is wrong").to_string();
    let error = error.split("\n   0: ").next().unwrap_or_default();
    assert_eq!(error, format!("{found}\n = allowed: {allowed}\n = mend: {mend}"));
}

#[test]
fn q_k_and_v() -> Result<()> {
    let (device, attention) = (device()?, load("tiny_plain")?);
    let bf16 = |shape: (usize, usize, usize, usize)| rows(0.7, shape, DType::BF16, &device);
    let x = bf16((1, 384, 1, 128))?;
    let call = |q: &Tensor, k: &Tensor, v: &Tensor| attention.forward(q, k, v);
    expect(
        call(&bf16((1, 384, 2, 128))?, &x, &x),
        [
            "k: found shape [1, 384, 1, 128]",
            "[1, 384, 2, 128], [B, S, H, D] of spec tiny_plain",
            "Give all the same B and H, and text rows once; transpose(1, 2) makes a view of [B, H, S, D]",
        ],
    );
    expect(
        call(&x.transpose(1, 2)?, &x, &x),
        [
            "q: found shape [1, 1, 384, 128]",
            "[1, 384, 384, 128], [B, S, H, D] of spec tiny_plain",
            "Give all the same B and H, and text rows once; transpose(1, 2) makes a view of [B, H, S, D]",
        ],
    );
    expect(
        call(&x.narrow(0, 0, 0)?, &x, &x),
        ["batch: found 0", "1 or more, batch x heads at most 65535", "Give at least one item"],
    );
    expect(
        call(&x.squeeze(0)?, &x, &x),
        [
            "q: found shape [384, 1, 128]",
            "[1, 384, 1, 128], [B, S, H, D] of spec tiny_plain",
            "Give all the same B and H, and text rows once; transpose(1, 2) makes a view of [B, H, S, D]",
        ],
    );
    expect(call(&x, &x.to_dtype(DType::F16)?, &x), ["k: found F16", "BF16 for spec tiny_plain", "Call to_dtype()"]);
    expect(
        call(&x, &x, &bf16((1, 128, 1, 384))?.transpose(1, 3)?),
        ["v: found 384 elements from one element of a row to the next", "contiguous rows", "Call contiguous()"],
    );
    expect(
        call(&x, &too_short(x.shape(), DType::BF16, &device)?, &x),
        [
            "k: found a storage of 49151 elements",
            "at least 49152, for shape [1, 384, 1, 128], strides [49152, 128, 128, 1] and offset 0",
            "Make the tensor with the shape that its storage has",
        ],
    );
    expect(
        call(&x, &x, &too_short((2, 384, 1, 128), DType::BF16, &device)?.narrow(0, 1, 1)?),
        [
            "v: found a storage of 98303 elements",
            "at least 98304, for shape [1, 384, 1, 128], strides [49152, 128, 128, 1] and offset 49152",
            "Make the tensor with the shape that its storage has",
        ],
    );
    Ok(())
}

#[test]
fn what_the_spec_does_not_have() -> Result<()> {
    let (device, mut attention) = (device()?, load("tiny_plain")?);
    let x = rows(0.7, (1, 384, 1, 128), DType::BF16, &device)?;
    let table = Tensor::zeros((384, 64), DType::F32, &device)?;
    attention.q_norm.weight = Some(Tensor::ones(128, DType::F32, &device)?);
    expect(
        attention.forward(&x, &x, &x),
        [
            "q_norm.weight: found a tensor",
            "nothing: spec tiny_plain has no QK-norm with it",
            "Leave it out, or change [qk_norm] of the spec",
        ],
    );
    attention.q_norm = Norm::default();
    attention.rope = Some(Rope { cos: table.clone(), sin: table });
    expect(
        attention.forward(&x, &x, &x),
        ["rope: found a tensor", "nothing: spec tiny_plain has no RoPE", "Leave it out, or change [rope] of the spec"],
    );
    attention.rope = None;
    attention.precisions = Some(Tensor::full(8_u32, (1, 1), &device)?);
    expect(
        attention.forward(&x, &x, &x),
        [
            "precisions: found a tensor",
            "nothing: spec tiny_plain has no heads of both precisions",
            "Leave it out, or change [precision] of the spec",
        ],
    );
    Ok(())
}

#[test]
fn what_the_spec_has() -> Result<()> {
    let (device, attention) = (device()?, load("tiny_text_last")?);
    let x = rows(0.7, (1, 139, 2, 64), DType::BF16, &device)?;
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &device);
    let table = zeros(&[115, 32])?;
    let rope = |cos: &Tensor, sin: &Tensor| Some(Rope { cos: cos.clone(), sin: sin.clone() });
    let call = |change: &dyn Fn(&mut Attention)| {
        let mut attention = attention.clone();
        attention.rope = rope(&table, &table);
        change(&mut attention);
        attention.forward(&x, &x, &x)
    };
    expect(
        call(&|a| a.rope = None),
        ["rope: found nothing", "cosines and sines, [115, 32] for spec tiny_text_last", "Set Attention::rope"],
    );
    let long_table = zeros(&[139, 32])?;
    expect(
        call(&|a| a.rope = rope(&table, &long_table)),
        ["rope.sin: found shape [139, 32]", "[115, 32] for spec tiny_text_last", "Give it this shape"],
    );
    let turned = zeros(&[32, 115])?.t()?;
    expect(
        call(&|a| a.rope = rope(&turned, &table)),
        ["rope.cos: found strides [1, 115]", "a contiguous tensor", "Call contiguous()"],
    );
    let wide = zeros(&[1, 115, 32])?;
    expect(
        call(&|a| a.rope = rope(&table, &wide)),
        [
            "rope: found 0 and 3680 elements from one batch item to the next",
            "the same for cosines and sines",
            "Give both in one layout",
        ],
    );
    let short = too_short((115, 32), DType::F32, &device)?;
    expect(
        call(&|a| a.rope = rope(&table, &short)),
        [
            "rope.sin: found a storage of 3679 elements",
            "at least 3680, for shape [115, 32], strides [32, 1] and offset 0",
            "Make the tensor with the shape that its storage has",
        ],
    );
    let half = zeros(&[64])?.to_dtype(DType::BF16)?;
    expect(
        call(&|a| a.k_norm.weight = Some(half.clone())),
        ["k_norm.weight: found BF16", "F32 for spec tiny_text_last", "Call to_dtype()"],
    );
    let long = zeros(&[128])?;
    expect(
        call(&|a| a.after.q_norm = Some(Norm { weight: Some(long.clone()), bias: None })),
        ["after.q_norm.weight: found shape [128]", "[64] for spec tiny_text_last", "Give it this shape"],
    );
    let bias = zeros(&[64])?;
    expect(
        call(&|a| a.k_norm.bias = Some(bias.clone())),
        [
            "k_norm.bias: found a tensor",
            "nothing: spec tiny_text_last has no QK-norm with it",
            "Leave it out, or change [qk_norm] of the spec",
        ],
    );
    let shifted = zeros(&[65])?.narrow(0, 1, 64)?;
    expect(
        call(&|a| a.q_norm.weight = Some(shifted.clone())),
        ["q_norm.weight: found an offset of 1 elements", "a multiple of 4, for reads of 16 bytes", "Call copy()"],
    );
    let side = rows(0.7, (1, 24, 2, 64), DType::BF16, &device)?;
    let apart = |k: &Tensor| Text { qkv: Some([side.clone(), k.clone(), side.clone()]), ..Text::default() };
    expect(
        call(&|a| a.after = apart(&side)),
        [
            "q: found shape [1, 139, 2, 64]",
            "[1, 115, 2, 64], [B, S, H, D] of spec tiny_text_last",
            "Give all the same B and H, and text rows once; transpose(1, 2) makes a view of [B, H, S, D]",
        ],
    );
    expect(
        call(&|a| a.before = apart(&side)),
        [
            "before.qkv: found a tensor",
            "nothing: spec tiny_text_last has no text on this side",
            "Leave it out, or change [before] of the spec",
        ],
    );
    let video = x.narrow(1, 0, 115)?;
    let call_video = |text: Text| {
        let mut attention = attention.clone();
        attention.rope = rope(&table, &table);
        attention.after = text;
        attention.forward(&video, &video, &video)
    };
    expect(
        call_video(apart(&x)),
        [
            "after.k: found shape [1, 139, 2, 64]",
            "[1, 24, 2, 64], [B, S, H, D] of spec tiny_text_last",
            "Give all the same B and H, and text rows once; transpose(1, 2) makes a view of [B, H, S, D]",
        ],
    );
    expect(
        call_video(apart(&side.to_dtype(DType::F16)?)),
        ["after.k: found F16", "BF16 for spec tiny_text_last", "Call to_dtype()"],
    );
    expect(
        call_video(apart(&too_short((1, 24, 2, 64), DType::BF16, &device)?)),
        [
            "after.k: found a storage of 3071 elements",
            "at least 3072, for shape [1, 24, 2, 64], strides [3072, 128, 64, 1] and offset 0",
            "Make the tensor with the shape that its storage has",
        ],
    );
    let lengths = Tensor::new(&[3_u32, 4], &device)?;
    expect(
        call(&|a| a.after = Text { lengths: Some(lengths.clone()), ..Text::default() }),
        ["after.lengths: found shape [2]", "[1] for spec tiny_text_last", "Give it this shape"],
    );
    let types = Tensor::new(&[[0_i64, 1]], &device)?;
    expect(
        call(&|a| a.head_types = HeadTypes::Given(types.clone())),
        ["head_types: found I64", "U32 for spec tiny_text_last", "Call to_dtype()"],
    );
    expect(
        call(&|a| a.half_widths = Some([0, 3])),
        ["half_widths, spatial: found 0", "1 to 115 tokens for spec tiny_text_last", "Leave it out for the spec's own"],
    );
    expect(
        call(&|a| a.scale = Some(f32::NAN)),
        ["scale: found NaN", "1.2e-38 to 3.7e36 in bf16 with head_dim 64", "Leave it out for 1 / sqrt(head_dim)"],
    );
    Ok(())
}

/// Memory of a GPU and of the CPU in one call.
#[cfg(feature = "cuda")]
#[test]
fn devices() -> Result<()> {
    let (device, mut attention) = (device()?, load("tiny_plain")?);
    let x = rows(0.7, (1, 384, 1, 128), DType::BF16, &device)?;
    let on_cpu = x.to_device(&Device::Cpu)?;
    expect(
        attention.forward(&on_cpu, &on_cpu, &on_cpu),
        [
            "device: found tensors of Cpu",
            "tensors of Cuda { gpu_id: 0 }, where the kernels were loaded",
            "Load them on the device of the tensors",
        ],
    );
    expect(
        attention.forward_with_output(&x, &on_cpu, &x).map(|output| output.out),
        ["k: found Cpu", "Cuda { gpu_id: 0 }, as for q", "Call to_device()"],
    );
    attention.head_types = HeadTypes::Given(Tensor::new(&[[0_u32]], &Device::Cpu)?);
    expect(
        attention.forward(&x, &x, &x),
        ["head_types: found Cpu", "Cuda { gpu_id: 0 }, as for q", "Call to_device()"],
    );
    Ok(())
}
