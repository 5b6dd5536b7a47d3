//! Results, compared with the same attention computed from candle's own ops.
//!
//! On the CPU the emulator runs the kernels. Built with the feature `cuda`, the same tests run on a
//! GPU, at larger sizes.

mod common;

use candle_core::{D, DType, Device, IndexOp, Result, Tensor, Var};
use common::{device, rows, wave};
use framestride_candle::shapes::dtype::Dtype;
use framestride_candle::shapes::spec::{self, Compute, NormKind, NormOver, Pairs, QkNorm, Width};
use framestride_candle::{Attention, HeadTypes, Norm, Rope, Spec, Text};

const FRAMES: usize = 5;
const FRAME_TOKENS: usize = if cfg!(feature = "cuda") { 400 } else { 26 };
const VIDEO: usize = FRAMES * FRAME_TOKENS;
const BEFORE: usize = 9;
const AFTER: usize = 20;
const S: usize = BEFORE + VIDEO + AFTER;
const BATCH: usize = 2;
const HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const EPS: f64 = 1e-5;
/// Valid tokens of the two batch items on each side.
const LENGTHS: [[u32; BATCH]; 2] = [[9, 4], [13, 20]];
const HALF_WIDTHS: [usize; 2] = [FRAME_TOKENS + 5, 4 * FRAMES + 3];

/// With `NormOver::Heads`, each head has RoPE tables of its own too.
fn spec(dtype: Dtype, kind: NormKind, over: NormOver, pairs: Pairs) -> Spec {
    Spec::builder()
        .name("candle")
        .frames(FRAMES as u32)
        .tokens_per_frame(FRAME_TOKENS as u32)
        .before(BEFORE as u32)
        .after(AFTER as u32)
        .heads(HEADS as u32)
        .head_dim(HEAD_DIM as u32)
        .dtype(dtype)
        .qk_norm(QkNorm { kind, over, eps: EPS })
        .rope(spec::Rope {
            pairs,
            channels: HEAD_DIM as u32,
            before: false,
            after: false,
            per_head: over == NormOver::Heads,
        })
        .spatial(Width::Tokens(HALF_WIDTHS[0] as u32))
        .temporal(Width::Tokens(HALF_WIDTHS[1] as u32))
        .build()
        .expect("the spec is right")
}

/// Attention with everything that can be given, and tensors for it.
struct Case {
    attention: Attention,
    qkv: [Tensor; 3],
    angles: Tensor,
}

impl Case {
    fn new(dtype: Dtype, kind: NormKind, over: NormOver, pairs: Pairs) -> Result<Case> {
        let device = device()?;
        let mut attention = Attention::load(&device, &spec(dtype, kind, over, pairs))?;
        let is_over_heads = over == NormOver::Heads;
        let length = if is_over_heads { HEADS * HEAD_DIM } else { HEAD_DIM };
        let norm = |seed: f64| -> Result<Norm> {
            let weight = Some(((wave(seed, length, &device)? * 0.5)? + 1.0)?);
            let bias = if kind == NormKind::Layer { Some((wave(seed + 0.3, length, &device)? * 0.2)?) } else { None };
            Ok(Norm { weight, bias })
        };
        (attention.q_norm, attention.k_norm) = (norm(0.9)?, norm(0.4)?);
        let lengths = |side: usize| Tensor::new(&LENGTHS[side], &device).map(Some);
        attention.before =
            Text { lengths: lengths(0)?, q_norm: Some(norm(0.15)?), k_norm: Some(Norm::default()), ..Text::default() };
        // These rows have the norm of the video.
        attention.after = Text { lengths: lengths(1)?, ..Text::default() };
        let table = if is_over_heads { vec![VIDEO, HEADS, HEAD_DIM / 2] } else { vec![VIDEO, HEAD_DIM / 2] };
        let angles = (wave(2.1, table, &device)? * 3.0)?;
        attention.rope = Some(Rope { cos: angles.cos()?, sin: angles.sin()? });
        let dtype = if dtype == Dtype::Bf16 { DType::BF16 } else { DType::F16 };
        let qkv = [0.7, 1.3, 0.2].map(|seed| rows(seed, (BATCH, S, HEADS, HEAD_DIM), dtype, &device));
        let [q, k, v] = qkv;
        Ok(Case { attention, qkv: [q?, k?, v?], angles })
    }

    fn bf16() -> Result<Case> {
        Case::new(Dtype::Bf16, NormKind::Rms, NormOver::Head, Pairs::Interleaved)
    }

    fn forward(&self) -> Result<Tensor> {
        let [q, k, v] = &self.qkv;
        self.attention.forward(q, k, v)
    }

    /// The output and the log-sum-exp, from candle's ops.
    fn plain(&self, types: [[u32; HEADS]; BATCH]) -> Result<[Tensor; 2]> {
        let [q, k, v] = self.qkv.each_ref().map(|rows| rows.to_dtype(DType::F32));
        let norms = |side: fn(&Text) -> &Option<Norm>, video: &'_ Norm| {
            [&self.attention.before, &self.attention.after].map(|text| side(text).clone().unwrap_or(video.clone()))
        };
        let (q_video, k_video) = (&self.attention.q_norm, &self.attention.k_norm);
        let q = self.prepared(&q?, q_video, norms(|text| &text.q_norm, q_video))?;
        let k = self.prepared(&k?, k_video, norms(|text| &text.k_norm, k_video))?;
        let scores = (q.matmul(&k.t()?)? * (HEAD_DIM as f64).powf(-0.5))?;
        let scores = (scores + mask(types, v.as_ref().expect("v converts").device())?)?;
        let highest = scores.max_keepdim(D::Minus1)?;
        let weights = scores.broadcast_sub(&highest)?.exp()?;
        let sums = weights.sum_keepdim(D::Minus1)?;
        let out = weights.broadcast_div(&sums)?.matmul(&v?.transpose(1, 2)?.contiguous()?)?;
        Ok([out.transpose(1, 2)?, (sums.log()? + highest)?.squeeze(D::Minus1)?])
    }

    /// Normalised and rotated rows, \[B, H, S, D\].
    fn prepared(&self, x: &Tensor, video: &Norm, [before, after]: [Norm; 2]) -> Result<Tensor> {
        let norm = self.attention.spec().qk_norm.as_ref().expect("the spec has a norm");
        let mean = |x: &Tensor| if norm.over == NormOver::Heads { x.mean_keepdim((2, 3)) } else { x.mean_keepdim(3) };
        let x = if norm.kind == NormKind::Layer { x.broadcast_sub(&mean(x)?)? } else { x.clone() };
        let x = x.broadcast_div(&(mean(&x.sqr()?)? + EPS)?.sqrt()?)?;
        let affine = |start: usize, length: usize, norm: &Norm| -> Result<Tensor> {
            let mut x = x.narrow(1, start, length)?;
            if let Some(weight) = &norm.weight {
                x = x.broadcast_mul(&weight.reshape(((), HEAD_DIM))?)?;
            }
            if let Some(bias) = &norm.bias {
                x = x.broadcast_add(&bias.reshape(((), HEAD_DIM))?)?;
            }
            Ok(x)
        };
        let rotated = self.rotated(&affine(BEFORE, VIDEO, video)?)?;
        let parts = [affine(0, BEFORE, &before)?, rotated, affine(BEFORE + VIDEO, AFTER, &after)?];
        Tensor::cat(&parts, 1)?.transpose(1, 2)?.contiguous()
    }

    fn rotated(&self, x: &Tensor) -> Result<Tensor> {
        let half = HEAD_DIM / 2;
        let is_half = self.attention.spec().rope.as_ref().is_some_and(|rope| rope.pairs == Pairs::Half);
        // Pairs are channels 2i and 2i + 1, or i and i + D/2.
        let (split, pair) =
            if is_half { ((BATCH, VIDEO, HEADS, 2, half), 3) } else { ((BATCH, VIDEO, HEADS, half, 2), 4) };
        let x = x.contiguous()?.reshape(split)?;
        let (a, b) = (x.narrow(pair, 0, 1)?.squeeze(pair)?, x.narrow(pair, 1, 1)?.squeeze(pair)?);
        // [VIDEO, D/2], for each batch item or for each head.
        let angles = match *self.angles.dims() {
            [BATCH, VIDEO, _] => self.angles.unsqueeze(2)?,
            [VIDEO, HEADS, _] => self.angles.unsqueeze(0)?,
            _ => self.angles.unsqueeze(0)?.unsqueeze(2)?,
        };
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Tensor::stack(&[first, second], pair)?.reshape((BATCH, VIDEO, HEADS, HEAD_DIM))
    }
}

/// What is added to the scores, \[B, H, S, S\]: minus infinity where a key is not seen.
///
/// A query sees valid text, and is seen everywhere when it is text itself. Video tokens see each
/// other when their positions differ by less than the half width.
fn mask(types: [[u32; HEADS]; BATCH], device: &Device) -> Result<Tensor> {
    let token = |row: usize| (BEFORE..BEFORE + VIDEO).contains(&row).then(|| row - BEFORE);
    let mut values = Vec::with_capacity(BATCH * HEADS * S * S);
    for (item, types) in types.iter().enumerate() {
        for head_type in types {
            let position = |token: usize| match head_type {
                2 => token % FRAME_TOKENS * FRAMES + token / FRAME_TOKENS,
                _ => token,
            };
            let half_width = [usize::MAX, HALF_WIDTHS[0], HALF_WIDTHS[1]][*head_type as usize];
            for row in 0..S {
                values.extend((0..S).map(|key| {
                    let is_near = match (token(row), token(key)) {
                        (Some(a), Some(b)) => position(a).abs_diff(position(b)) < half_width,
                        _ => true,
                    };
                    if is_valid(item, key) && is_near { 0.0 } else { f32::NEG_INFINITY }
                }));
            }
        }
    }
    Tensor::from_vec(values, (BATCH, HEADS, S, S), device)
}

/// Whether a row holds something.
fn is_valid(item: usize, row: usize) -> bool {
    row < LENGTHS[0][item] as usize || (BEFORE..BEFORE + VIDEO + LENGTHS[1][item] as usize).contains(&row)
}

/// The largest difference among valid rows of \[B, S, ...\].
fn difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    let difference = (a.to_dtype(DType::F32)? - b.to_dtype(DType::F32)?)?.abs()?.flatten_from(2)?.max(D::Minus1)?;
    let rows = difference.to_vec2::<f32>()?;
    let valid = rows.iter().enumerate().flat_map(|(item, rows)| {
        rows.iter().enumerate().filter(move |&(row, _)| is_valid(item, row)).map(|(_, difference)| *difference)
    });
    // NaN is larger than any number here.
    Ok(valid.fold(0.0, |most, difference| if difference <= most { most } else { difference }))
}

/// The bits of a tensor.
fn bits(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

const DENSE: [[u32; HEADS]; BATCH] = [[0; HEADS]; BATCH];
const MIXED: [[u32; HEADS]; BATCH] = [[1, 2, 0], [2, 0, 1]];

/// V is at most 1. Weights in bf16 have an error of 2^-9, scores one of a few times as much.
const BF16: f32 = 0.015;
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

/// Tensors of another stream of the same GPU, and weights of the first one.
#[cfg(feature = "cuda")]
#[test]
fn tensors_of_another_stream() -> Result<()> {
    let mut case = Case::bf16()?;
    let expected = bits(&case.forward()?)?;
    let other = Device::new_cuda_with_stream(0)?;
    for _ in 0..20 {
        // The copies to the host and back make the tensors in the memory and the order of that
        // stream.
        let [q, k, v] = case.qkv.each_ref().map(|x| x.to_device(&Device::Cpu)?.to_device(&other));
        let [q, k, v] = [q?, k?, v?].map(|x| (&x + &x)? * 0.5);
        let out = case.attention.forward(&q?, &k?, &v?)?;
        assert_eq!(bits(&out)?, expected);
        // Queries of one stream, keys of another one.
        let mixed = case.attention.forward(
            &case.qkv[0],
            &case.qkv[1].to_device(&Device::Cpu)?.to_device(&other)?,
            &case.qkv[2],
        )?;
        assert_eq!(bits(&mixed)?, expected);
    }
    case.attention = Attention::load(&other, case.attention.spec())?;
    drop(case);
    Ok(())
}
