//! Results, compared with the same attention computed from candle's own ops.
//!
//! On the CPU the emulator runs the kernels. Built with the feature `cuda`, the same tests run on a
//! GPU, at larger sizes.

mod case;
mod common;

use candle_core::{DType, IndexOp, Result, Tensor, Var};
use case::{AFTER, BATCH, BEFORE, BF16, Case, HEAD_DIM, HEADS, MIXED, S, VIDEO, bits, difference, is_valid};
use common::{device, rows, wave};
use framestride_candle::shapes::dtype::Dtype;
use framestride_candle::shapes::spec::{Compute, NormKind, NormOver, Pairs};
use framestride_candle::{Attention, HeadTypes, Rope, Spec};

const DENSE: [[u32; HEADS]; BATCH] = [[0; HEADS]; BATCH];
const F16: f32 = 0.003;

#[test]
fn dense_heads() -> Result<()> {
    let mut case = Case::bf16()?;
    case.attention.head_types = HeadTypes::Dense;
    let out = case.forward()?;
    let [plain, _] = case.plain(DENSE)?;
    assert_eq!((out.dims(), out.dtype()), (&[BATCH, S, HEADS, HEAD_DIM][..], DType::BF16));
    assert!(difference(&out, &plain)? < BF16, "{}", difference(&out, &plain)?);
    for item in 0..BATCH {
        for row in (0..S).filter(|&row| !is_valid(item, row)) {
            assert!(bits(&out.i((item, row))?)?.iter().all(|&x| x == 0.0), "rows of invalid text are zero");
        }
    }
    Ok(())
}

#[test]
fn given_types_and_log_sum_exp() -> Result<()> {
    for (dtype, kind, over, pairs, tolerance) in [
        (Dtype::Bf16, NormKind::Rms, NormOver::Head, Pairs::Interleaved, BF16),
        (Dtype::Bf16, NormKind::Rms, NormOver::Heads, Pairs::Interleaved, BF16),
        (Dtype::F16, NormKind::Layer, NormOver::Head, Pairs::Half, F16),
    ] {
        let mut case = Case::new(dtype, kind, over, pairs)?;
        let device = case.qkv[0].device().clone();
        case.attention.head_types = HeadTypes::Given(Tensor::new(&MIXED, &device)?);
        let [q, k, v] = &case.qkv;
        let output = case.attention.forward_with_output(q, k, v)?;
        let [plain, lse] = case.plain(MIXED)?;
        let found = difference(&output.out, &plain)?;
        assert!(found < tolerance, "{found}");
        let found = difference(&output.lse.transpose(1, 2)?, &lse.transpose(1, 2)?)?;
        assert!(found < tolerance, "log-sum-exp: {found}");
        assert!(output.head_types.is_none() && output.errors.is_none(), "nothing was profiled");
        let [dense, _] = case.plain(DENSE)?;
        assert!(difference(&output.out, &dense)? > 10.0 * tolerance, "the masks hide something");
    }
    Ok(())
}

#[test]
fn profiled_heads() -> Result<()> {
    let mut case = Case::bf16()?;
    let [q, k, v] = &case.qkv;
    let output = case.attention.forward_with_output(q, k, v)?;
    let types = output.head_types.expect("the call profiled");
    let errors = output.errors.expect("the call profiled").to_vec3::<f32>()?;
    let found: Vec<Vec<u32>> = types.to_vec2()?;
    for (errors, head_type) in errors.iter().flatten().zip(found.iter().flatten()) {
        let lower = if errors[0] <= errors[1] { 1 } else { 2 };
        assert_eq!(*head_type, lower, "{errors:?}");
        assert!(errors.iter().all(|&error| error > 0.0), "{errors:?}");
    }
    let as_array = std::array::from_fn(|item| std::array::from_fn(|head| found[item][head]));
    let [plain, _] = case.plain(as_array)?;
    let difference = difference(&output.out, &plain)?;
    assert!(difference < BF16, "{difference}");
    // What was found can be given, and gives the same bits.
    case.attention.head_types = HeadTypes::Given(types);
    assert_eq!(bits(&case.forward()?)?, bits(&output.out)?);
    Ok(())
}

#[test]
fn strides_and_offsets() -> Result<()> {
    let mut case = Case::bf16()?;
    let device = case.qkv[0].device().clone();
    case.attention.head_types = HeadTypes::Given(Tensor::new(&MIXED, &device)?);
    let expected = bits(&case.forward()?)?;
    let [q, k, v] = case.qkv.clone();
    let attention = &case.attention;
    // Views of [B, H, S, D].
    let turned = |x: &Tensor| x.transpose(1, 2)?.contiguous()?.transpose(1, 2);
    assert_eq!(bits(&attention.forward(&turned(&q)?, &turned(&k)?, &turned(&v)?)?)?, expected);
    // One packed tensor, [B, S, 3, H, D].
    let packed = Tensor::stack(&[&q, &k, &v], 2)?;
    let part = |index: usize| packed.narrow(2, index, 1)?.squeeze(2);
    assert_eq!(bits(&q.apply_op3(&part(1)?, &part(2)?, attention.clone())?)?, expected);
    assert_eq!(bits(&attention.forward(&part(0)?, &part(1)?, &part(2)?)?)?, expected);
    // Parts of longer tensors. The offsets are no multiples of 16 bytes.
    let inside = |x: &Tensor| -> Result<Tensor> {
        let flat = x.flatten_all()?;
        let longer = Tensor::cat(&[&flat.narrow(0, 0, 3)?, &flat, &flat.narrow(0, 0, 5)?], 0)?;
        longer.narrow(0, 3, flat.elem_count())?.reshape(x.shape())
    };
    let shifted = inside(&q)?;
    assert_eq!(shifted.layout().start_offset(), 3);
    assert_eq!(bits(&attention.forward(&shifted, &inside(&k)?, &inside(&v)?)?)?, expected);
    // All batch items share keys and values.
    let shared = |x: &Tensor| x.i(..1)?.broadcast_as(x.shape());
    let copied = |x: &Tensor| shared(x)?.contiguous();
    let expected = attention.forward(&q, &copied(&k)?, &copied(&v)?)?;
    assert_eq!(bits(&attention.forward(&q, &shared(&k)?, &shared(&v)?)?)?, bits(&expected)?);
    Ok(())
}

#[test]
fn text_in_tensors_of_its_own() -> Result<()> {
    let mut case = Case::bf16()?;
    let device = case.qkv[0].device().clone();
    case.attention.head_types = HeadTypes::Given(Tensor::new(&MIXED, &device)?);
    let output = |case: &Case| -> Result<[Vec<f32>; 2]> {
        let [q, k, v] = &case.qkv;
        let output = case.attention.forward_with_output(q, k, v)?;
        Ok([bits(&output.out)?, bits(&output.lse)?])
    };
    let expected = output(&case)?;
    let joined = case.qkv.clone();
    let part = |start: usize, rows: usize| -> Result<[Tensor; 3]> {
        let [q, k, v] = &joined;
        // Views of the joined tensors, and copies.
        Ok([q.narrow(1, start, rows)?, k.narrow(1, start, rows)?.contiguous()?, v.narrow(1, start, rows)?])
    };
    for (before, after) in [(true, false), (false, true), (true, true)] {
        case.attention.before.qkv = if before { Some(part(0, BEFORE)?) } else { None };
        case.attention.after.qkv = if after { Some(part(BEFORE + VIDEO, AFTER)?) } else { None };
        let (start, end) = (if before { BEFORE } else { 0 }, if after { BEFORE + VIDEO } else { S });
        case.qkv = part(start, end - start)?;
        assert_eq!(output(&case)?, expected, "before {before}, after {after}");
    }
    Ok(())
}

#[test]
fn tables_of_batch_items() -> Result<()> {
    let mut case = Case::bf16()?;
    let device = case.qkv[0].device().clone();
    case.attention.head_types = HeadTypes::Dense;
    let alike = case.forward()?;
    let shape = (BATCH, VIDEO, HEAD_DIM / 2);
    let wide = |table: &Tensor| table.broadcast_as(shape);
    let Some(rope) = &case.attention.rope else { unreachable!("the case has RoPE") };
    let rope = Rope { cos: wide(&rope.cos)?, sin: wide(&rope.sin)? };
    case.attention.rope = Some(rope);
    assert_eq!(bits(&case.forward()?)?, bits(&alike)?);
    case.angles = (wave(1.9, shape, &device)? * 3.0)?;
    case.attention.rope = Some(Rope { cos: case.angles.cos()?, sin: case.angles.sin()? });
    let [plain, _] = case.plain(DENSE)?;
    let difference = difference(&case.forward()?, &plain)?;
    assert!(difference < BF16, "{difference}");
    Ok(())
}

#[test]
fn numbers_of_a_call() -> Result<()> {
    let mut case = Case::bf16()?;
    let device = case.qkv[0].device().clone();
    case.attention.head_types = HeadTypes::Given(Tensor::new(&[[1_u32; HEADS]; BATCH], &device)?);
    let expected = case.forward()?;
    // A half width of all tokens hides nothing, and another scale is another result.
    case.attention.half_widths = Some([VIDEO as u32; 2]);
    let [dense, _] = case.plain(DENSE)?;
    assert!(difference(&case.forward()?, &dense)? < BF16);
    case.attention.half_widths = None;
    case.attention.scale = Some(0.3);
    assert!(difference(&case.forward()?, &expected)? > BF16);
    case.attention.scale = Some((HEAD_DIM as f32).powf(-0.5));
    assert_eq!(bits(&case.forward()?)?, bits(&expected)?);
    // Another seed samples other rows.
    case.attention.head_types = HeadTypes::Profiled;
    let [q, k, v] = &case.qkv;
    let errors = |seed: Option<u64>| -> Result<Vec<f32>> {
        let mut attention = case.attention.clone();
        attention.seed = seed;
        bits(&attention.forward_with_output(q, k, v)?.errors.expect("the call profiled"))
    };
    assert_eq!(errors(None)?, errors(None)?);
    assert_ne!(errors(None)?, errors(Some(99))?);
    Ok(())
}

#[test]
fn bits_of_heads() -> Result<()> {
    let device = device()?;
    let load = |compute: Compute, bound: Option<f64>| {
        let spec = Spec::shipped("tiny_e4m3").expect("it is shipped").to_builder();
        Attention::load(&device, &spec.compute(compute).largest_error(bound).build().expect("the spec is right"))
    };
    let attention = match load(Compute::E4m3, Some(1.0)) {
        // Other GPUs than a Hopper have no such kernels.
        Err(error) if cfg!(feature = "cuda") => {
            println!("left out: {error}");
            return Ok(());
        }
        attention => attention?,
    };
    let spec = attention.spec();
    let shape = (2, spec.layout.sequence() as usize, 3, 128);
    let [q, k, v] = [0.7, 1.3, 0.2].map(|seed| rows(seed, shape, DType::BF16, &device));
    let (q, k, v) = (q?, k?, v?);
    let angles = (wave(2.1, (spec.layout.video_tokens() as usize, 64), &device)? * 3.0)?;
    let rope = Some(Rope { cos: angles.cos()?, sin: angles.sin()? });
    let output = |attention: &Attention| {
        let mut attention = attention.clone();
        attention.rope.clone_from(&rope);
        attention.forward_with_output(&q, &k, &v)
    };
    let mut errors = bits(&output(&attention)?.precision_errors.expect("the call found them"))?;
    errors.sort_by(f32::total_cmp);
    // A bound that half of the heads exceed.
    let mut attention = load(Compute::E4m3, Some(f64::from(errors[2] + errors[3]) / 2.0))?;
    let found = output(&attention)?;
    let precisions = found.precisions.expect("the call found them");
    assert_eq!(precisions.flatten_all()?.to_vec1::<u32>()?.iter().filter(|&&bits| bits == 16).count(), 3);
    // What was found can be given, and gives the same bits.
    let types = HeadTypes::Given(found.head_types.expect("the call profiled"));
    (attention.head_types, attention.precisions) = (types.clone(), Some(precisions));
    let given = output(&attention)?;
    assert_eq!(bits(&given.out)?, bits(&found.out)?);
    assert!(given.precisions.is_none() && given.precision_errors.is_none(), "nothing was found");
    // All in 16 bits are those of a spec in 16.
    attention.precisions = Some(Tensor::full(16_u32, (2, 3), &device)?);
    let mut in_16_bits = load(Compute::Dtype, None)?;
    in_16_bits.head_types = types;
    assert_eq!(bits(&output(&attention)?.out)?, bits(&output(&in_16_bits)?.out)?);
    assert_ne!(bits(&given.out)?, bits(&output(&in_16_bits)?.out)?);
    Ok(())
}

#[test]
fn there_is_no_gradient() -> Result<()> {
    let case = Case::bf16()?;
    let [q, k, v] = &case.qkv;
    let q = Var::from_tensor(q)?;
    let backward = case.attention.forward(&q, k, v)?.sum_all()?.backward().map(drop);
    let output = case.attention.forward_with_output(&q, k, v).map(drop);
    for refused in [backward, output] {
        let message = refused.expect_err("there is none").to_string();
        assert!(message.starts_with("backward is not supported for framestride"), "{message}");
    }
    Ok(())
}
