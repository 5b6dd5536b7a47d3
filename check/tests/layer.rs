//! Whole layers of the shipped tiny specs in the emulator, compared with the reference. Every case
//! of `verify` is run, and what it leaves out.

use std::fmt::Write;
use std::sync::Arc;

use framestride::shapes::arch::Arch as Family;
use framestride::shapes::layout::HeadType;
use framestride::shapes::params::Tensor;
use framestride::shapes::spec::{Compute, Dtype, Width};
use framestride::{Device, HeadPrecision, HeadTypes, Kernels, Layer, Module, SparseAttention, Spec, Stream, Workspace};
use framestride_check::device_tensors::{Arrangement, DeviceLayer, DeviceTensor, POISON, Placement};
use framestride_check::layer_run::run_layer;
use framestride_check::rope::RopeTables;
use framestride_check::tensors::{Inputs, Tokens, narrow, widen};
use framestride_check::verify::{Case, CaseContent, CaseExtent, CaseText, CaseTypes, Effort, verify_case};

fn module_of(arch: Family, name: &str) -> Arc<Module> {
    let kernels = Kernels::for_spec(&Spec::shipped(name).unwrap(), arch).unwrap();
    Module::load_kernels(&Device::emulator(), &kernels).unwrap()
}

fn module(name: &str) -> Arc<Module> {
    module_of(Family::default(), name)
}

/// A seed that differs each time. It is printed, so that a failure can be had again.
fn fresh_seed() -> u64 {
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos().into();
    println!("seed {seed}");
    seed
}

fn passes(name: &str, cases: &[Case]) {
    pass(&module(name), cases);
}

fn pass(module: &Arc<Module>, cases: &[Case]) {
    let (name, seed) = (&module.spec().name, fresh_seed());
    for case in cases {
        for check in verify_case(module, case, seed, Effort::default()).unwrap() {
            assert!(check.ok, "{name}, seed {seed}: {check:?}");
        }
    }
    let Device::Emulator(emulator) = module.device() else { panic!("these layers run in the emulator") };
    for (entry, stats) in emulator.statistics() {
        // Tiles are read and written without bank conflicts. Profiling stores its sampled rows
        // once, word by word, and has some.
        let (conflicts, report) = stats.bank_conflicts();
        assert!(conflicts == 0 || entry == "profile", "{name}, {entry}: {conflicts} bank conflicts\n{report}");
    }
}

macro_rules! shipped {
    ($arch:expr; $($name:ident)*) => {$(
        #[test]
        fn $name() {
            let module = crate::module_of($arch, stringify!($name));
            crate::pass(&module, &crate::Case::all(&module.spec().layout, true));
        }
    )*};
}

mod sm_90a {
    shipped!(crate::Family::SM_90A; tiny_e4m3 tiny_heads_sinks tiny_layer_half tiny_plain tiny_text_last tiny_text_rope);
}

mod sm_80 {
    shipped!(crate::Family::SM_80; tiny_heads_sinks tiny_layer_half tiny_plain tiny_text_last tiny_text_rope);
}

/// The tiny specs with head dim 128, in 8 bits: all cases of `verify`, and a layer on given inputs.
#[test]
fn eight_bits() {
    for name in ["tiny_layer_half", "tiny_plain", "tiny_text_rope"] {
        let spec = Spec::shipped(name).unwrap().to_builder().compute(Compute::E4m3).build().unwrap();
        let module = Module::load(&Device::emulator(), &spec).unwrap();
        pass(&module, &Case::all(&spec.layout, true));
        let inputs = Inputs::random(&spec, spec.batch as usize, spec.heads as usize, fresh_seed());
        let report = run_layer(&module, &inputs, &[], &|_, _| ()).unwrap().report;
        for head in &report.heads {
            // Rounding to 8 bits shows, and no more than that.
            assert!(head.ok && head.rel_error > 0.005, "{name}: {} of {}", head.rel_error, head.tolerance);
        }
    }
}

/// A head gives, bit for bit, what it gives where all heads are in its precision, whether that is
/// found or given. Without profiling and precisions, all are in 16 bits.
#[test]
fn precisions_of_heads() {
    let bound = Spec::shipped("tiny_e4m3").unwrap();
    let with = |compute, largest_error: Option<f64>| {
        let spec = bound.to_builder().compute(compute).largest_error(largest_error).build().unwrap();
        Module::load(&Device::emulator(), &spec).unwrap()
    };
    let [eight, sixteen] = [Compute::E4m3, Compute::Dtype].map(|compute| with(compute, None));
    let module = with(Compute::E4m3, Some(0.05));
    let (batch, heads) = (2, 3);
    let mut inputs = Inputs::rough(&bound, batch, heads, fresh_seed());
    (inputs.before.lengths, inputs.after.lengths) = (Some(vec![9, 4]), Some(vec![0, 20]));
    // The output and the log-sum-exps of each head, and what profiling found.
    let forward = |module: &Arc<Module>, types, precisions: Option<&[u32]>| {
        let device = module.device();
        let attention = SparseAttention::new(module, batch as u32, heads as u32).unwrap();
        let workspace = Workspace::allocate(device, attention.workspace_bytes()).unwrap();
        let placement = Placement::all(Arrangement::Unaligned);
        let mut placed = DeviceLayer::upload(device, &bound.layout, &inputs, placement).unwrap();
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let given = precisions.map(|precisions| device.upload(&words(precisions)).unwrap());
        placed.layer.precisions = given.as_ref().map_or(0, |given| given.address());
        // SAFETY: all memory is this function's, and outlives the work.
        unsafe { attention.forward(Stream::DEFAULT, &placed.layer, types, &workspace).unwrap() };
        let (out, lse) = (placed.out.download(device).unwrap().0, placed.download_lse(device).unwrap());
        let of_head = |index: usize| {
            let rows = (0..out.rows).flat_map(|row| out.row(index / heads, row, index % heads)).collect::<Vec<f64>>();
            (rows, lse.chunks_exact(out.rows).nth(index).unwrap().to_vec())
        };
        ((0..batch * heads).map(of_head).collect::<Vec<_>>(), attention.read_profile(&workspace).unwrap())
    };
    let [(eights, _), (sixteens, _)] = [&eight, &sixteen].map(|module| forward(module, HeadTypes::Profiled, None));
    let expected = |precisions: &[u32]| {
        let pick = |(index, &bits): (usize, &u32)| [&eights, &sixteens][usize::from(bits != 8)][index].clone();
        precisions.iter().enumerate().map(pick).collect::<Vec<_>>()
    };
    let (found, profiles) = forward(&module, HeadTypes::Profiled, None);
    let precisions: Vec<_> = profiles.iter().map(|profile| profile.precision.unwrap()).collect();
    println!("{precisions:?}");
    let bits: Vec<u32> = precisions.iter().map(|precision| precision.compute.bits()).collect();
    assert_eq!(bits, [8, 16, 8, 8, 16, 8]);
    assert!(found == expected(&bits), "found");
    // Every number but 8 stands for 16 bits.
    for given in [[8, 16, 8, 8, 16, 8], [16, 8, 8, 16, 8, 8], [0, 32, 16, u32::MAX, 9, 16], [8; 6]] {
        let (outputs, _) = forward(&module, HeadTypes::Profiled, Some(&given));
        assert!(outputs == expected(&given), "{given:?}");
    }
    let (dense, _) = forward(&module, HeadTypes::Dense, None);
    assert!(dense == forward(&sixteen, HeadTypes::Dense, None).0, "dense");
    let report = run_layer(&module, &inputs, &[], &|_, _| ()).unwrap().report;
    for (head, bits) in report.heads.iter().zip(bits) {
        assert!(head.ok && head.bits == bits, "{head:?}");
    }
}

/// The error of a head does not depend on the size of V. Where V is so small or large that 8 bits
/// lose it, the error says so, and the head stays in 16 bits.
#[test]
fn errors_of_small_and_large_values() {
    let module = module("tiny_e4m3");
    let (spec, device) = (module.spec(), module.device());
    let inputs = Inputs::random(spec, 1, 2, fresh_seed());
    let attention = SparseAttention::new(&module, 1, 2).unwrap();
    let workspace = Workspace::allocate(device, attention.workspace_bytes()).unwrap();
    let errors = |power: i32| {
        let mut scaled = inputs.clone();
        scaled.v.fill(|batch, row, head, values| {
            let wide = inputs.v.row(batch, row, head);
            values.iter_mut().zip(wide).for_each(|(value, x)| *value = x * 2f64.powi(power));
        });
        let placed =
            DeviceLayer::upload(device, &spec.layout, &scaled, Placement::all(Arrangement::TokensFirst)).unwrap();
        // SAFETY: all memory is this function's, and outlives the work.
        unsafe { attention.forward(Stream::DEFAULT, &placed.layer, HeadTypes::Profiled, &workspace).unwrap() };
        let profiles = attention.read_profile(&workspace).unwrap();
        profiles.into_iter().map(|profile| profile.precision.unwrap()).collect::<Vec<_>>()
    };
    let expected = errors(0);
    assert!(expected.iter().all(|head| (0.005..0.2).contains(&head.error)), "{expected:?}");
    for power in [-56, 50] {
        assert_eq!(errors(power), expected, "2^{power}");
    }
    // These are 8e-31 and 1e30.
    for power in [-100, 100] {
        let found = errors(power);
        let is_lost = |head: &HeadPrecision| head.error > 0.5 && head.compute == Compute::Dtype;
        assert!(found.iter().all(is_lost), "2^{power}: {found:?}");
    }
}

/// Kernels in 8 bits for so many frames and tokens of each.
fn in_eight_bits([frames, tokens]: [u32; 2], heads: u32, half_width: u32) -> Arc<Module> {
    let text = format!(
        "name = \"in_eight_bits\"\n[video]\nframes = {frames}\ntokens_per_frame = {tokens}\n
        [attention]\nheads = {heads}\nhead_dim = 128\ncompute = \"e4m3\"\n
        [masks.spatial]\nhalf_width = {half_width}\n[masks.temporal]\nhalf_width = {half_width}\n"
    );
    Module::load(&Device::emulator(), &Spec::parse("in_eight_bits", &text).unwrap()).unwrap()
}

/// One video token is its own mean, so nothing is left of V.
#[test]
fn few_tokens_in_eight_bits() {
    for (frames, tokens) in [(1, 1), (3, 1), (1, 3), (2, 1)] {
        let module = in_eight_bits([frames, tokens], 2, 1);
        pass(&module, &Case::all(&module.spec().layout, true));
    }
}

/// In 8 bits, profiling goes over the keys in two halves. The second may have no valid key.
#[test]
fn half_of_the_keys_in_eight_bits() {
    let spec = in_eight_bits([3, 16], 2, 16).spec().to_builder().before(30).after(200).build().unwrap();
    let module = Module::load(&Device::emulator(), &spec).unwrap();
    assert!(spec.profiled_rows() > spec.layout.video_tokens());
    for text in [CaseText::Empty, CaseText::Partial, CaseText::FullGiven] {
        pass(&module, &[Case { text: [text; 2], ..Case::new(CaseTypes::Profiled, CaseContent::Random) }]);
    }
}

/// In 8 bits an accumulator must not have all keys of a long sequence. With these values it would
/// lose more than the tolerance allows.
#[test]
fn many_keys_in_eight_bits() {
    let module = in_eight_bits([4, 1024], 1, 9);
    pass(&module, &[Case::new(CaseTypes::Dense, CaseContent::Drifting)]);
}

/// Where all weights are alike, what rounding took from V is given back, though the mean of the
/// sampled rows is not that of all. Each of 1024 keys loses 1/40 of its size to rounding, and so
/// would the output.
#[test]
fn flat_weights_in_eight_bits() {
    let module = in_eight_bits([4, 256], 1, 1024);
    let seed = fresh_seed();
    let mut inputs = Inputs::random(module.spec(), 1, 1, seed);
    inputs.q.bits.fill(0);
    // Their root mean square becomes almost 8, the most there is.
    inputs.v.bits.iter_mut().for_each(|bits| *bits = narrow(Dtype::Bf16, 0.95 * widen(Dtype::Bf16, *bits)));
    let report = run_layer(&module, &inputs, &[], &|_, _| ()).unwrap().report;
    let [head] = &report.heads[..] else { panic!("{} heads", report.heads.len()) };
    // Twice what the output may lose when it is rounded to bf16.
    assert!(head.ok && head.rel_error < 2.0 / 256.0, "seed {seed}: {}", head.rel_error);
}

/// Where one channel of each eight is 8 times as large in Q and in K, neighbours share what rounding takes
/// from it. A simulation of other inputs of this kind has errors of 0.046 to 0.052 so, and of 0.096 to
/// 0.107 where each channel is rounded by itself.
#[test]
fn large_channels_in_eight_bits() {
    let module = in_eight_bits([4, 256], 2, 1024);
    let seed = fresh_seed();
    let mut inputs = Inputs::rough(module.spec(), 1, 2, seed);
    for bits in [&mut inputs.q.bits, &mut inputs.k.bits] {
        let large = bits.iter_mut().skip(3).step_by(8);
        large.for_each(|bits| *bits = narrow(Dtype::Bf16, 8.0 * widen(Dtype::Bf16, *bits)));
    }
    // Scores get a standard deviation of 3.
    inputs.scale = Some(3.0 / f32::sqrt(16.0 * (8f32.powi(4) + 7.0)));
    let report = run_layer(&module, &inputs, &[], &|_, _| ()).unwrap().report;
    // The queries of the first head are zero.
    let head = &report.heads[1];
    assert!(head.ok && head.rel_error < 0.075, "seed {seed}: {}", head.rel_error);
}

/// Every arrangement of the inputs is tried with every arrangement of the output.
#[test]
fn arrangements() {
    let cases: Vec<Case> = Arrangement::ALL
        .into_iter()
        .flat_map(|inputs| Arrangement::ALL.map(|out| (inputs, out)))
        .map(|(inputs, out)| Case {
            text: [CaseText::Partial; 2],
            placement: Placement { inputs, text: [None; 2], out },
            ..Case::new(CaseTypes::Mixed, CaseContent::Random)
        })
        .collect();
    passes("tiny_text_last", &cases);
}

/// Of a layer that is too large to be compared whole, some rows are compared, and something of
/// every head.
#[test]
fn a_sample() {
    let (module, seed) = (module("tiny_heads_sinks"), fresh_seed());
    for case in Case::all(&module.spec().layout, true) {
        for check in
            verify_case(&module, &case, seed, Effort { reference_operations: 0.0, ..Effort::default() }).unwrap()
        {
            assert!(check.ok, "seed {seed}: {check:?}");
            let sampled = [
                "packed q",
                "packed k",
                "packed v",
                "sampled rows of q",
                "profiled k",
                "profiled v",
                "output",
                "output as a whole",
                "mean error of the output",
                "log-sum-exp",
                "sampled outputs",
                "sampled log-sum-exps",
                "errors of the samples",
                "mean squared errors",
            ];
            // Where there are three heads, one of each type are all of them.
            let some = if case.launch_extent(module.spec()) == [1, 3] { 1..check.of + 1 } else { 1..check.of };
            let compared = if sampled.contains(&check.quantity) { some } else { check.of..check.of + 1 };
            assert!(compared.contains(&check.compared), "seed {seed}: {check:?}");
        }
    }
}

/// Every mask is tried with every length of text.
#[test]
fn masks_and_text_lengths() {
    let types = HeadType::ALL.map(CaseTypes::All).into_iter().chain([CaseTypes::Profiled]);
    let cases: Vec<Case> = types
        .flat_map(|types| [CaseText::Empty, CaseText::Partial, CaseText::FullGiven].map(|text| (types, text)))
        .map(|(types, text)| Case { text: [text; 2], ..Case::new(types, CaseContent::Random) })
        .collect();
    passes("tiny_heads_sinks", &cases);
    // With text on both sides, every length of one meets every length of the other.
    let lengths = [CaseText::Empty, CaseText::Partial, CaseText::FullGiven, CaseText::Beyond];
    let cases: Vec<Case> = lengths
        .into_iter()
        .flat_map(|before| lengths.map(|after| [before, after]))
        .zip([CaseTypes::Mixed, CaseTypes::Profiled, CaseTypes::Dense].into_iter().cycle())
        .map(|(text, types)| Case { text, ..Case::new(types, CaseContent::Random) })
        .collect();
    passes("tiny_text_rope", &cases);
}

/// The output of one layer.
fn forward(module: &Arc<Module>, inputs: &Inputs, types: HeadTypes) -> Tokens {
    let device = module.device();
    let attention = SparseAttention::new(module, inputs.q.batch as u32, inputs.q.heads as u32).unwrap();
    let workspace = Workspace::allocate(device, attention.workspace_bytes()).unwrap();
    let placed =
        DeviceLayer::upload(device, &module.spec().layout, inputs, Placement::all(Arrangement::TokensFirst)).unwrap();
    // SAFETY: all memory is this function's, and outlives the work.
    unsafe { attention.forward(Stream::DEFAULT, &placed.layer, types, &workspace).unwrap() };
    placed.out.download(device).unwrap().0
}

/// A launch samples the rows that its seed draws, or without one those of the spec's seed.
#[test]
fn seeds_of_launches() {
    let module = module("tiny_text_last");
    let inputs = Inputs::random(module.spec(), 1, 2, 9);
    let attention = SparseAttention::new(&module, 1, 2).unwrap();
    let device = module.device();
    let workspace = Workspace::allocate(device, attention.workspace_bytes()).unwrap();
    let mut placed =
        DeviceLayer::upload(device, &module.spec().layout, &inputs, Placement::all(Arrangement::TokensFirst)).unwrap();
    let mut profiles = |seed| {
        placed.layer.seed = seed;
        // SAFETY: all memory is this function's, and outlives the work.
        unsafe { attention.forward(Stream::DEFAULT, &placed.layer, HeadTypes::Profiled, &workspace).unwrap() };
        attention.read_profile(&workspace).unwrap()
    };
    let own = profiles(None);
    assert_eq!(profiles(Some(module.spec().profile.seed)), own);
    let seeds = [0, 2, 1 << 40, u64::MAX];
    let others = seeds.map(|seed| profiles(Some(seed)));
    for (index, other) in others.iter().enumerate() {
        assert_ne!(*other, own);
        assert!(others[..index].iter().all(|earlier| earlier != other));
    }
    // Which rows they are, the reference says.
    let case = Case { seeded: true, ..Case::new(CaseTypes::Profiled, CaseContent::Random) };
    for seed in seeds {
        for check in verify_case(&module, &case, seed, Effort::default()).unwrap() {
            assert!(check.ok, "seed {seed}: {check:?}");
        }
    }
}

/// A launch with half widths of its own gives, bit for bit, what kernels of a spec with them give.
/// The next launch without them has the spec's again.
#[test]
fn half_widths_of_launches() {
    let module = module("tiny_heads_sinks");
    let (device, spec) = (module.device(), module.spec());
    let inputs = Inputs::random(spec, 1, spec.heads as usize, fresh_seed());
    let types: Vec<u8> = (0..spec.heads).flat_map(|head| (1 + head % 2).to_le_bytes()).collect();
    let given = device.upload(&types).unwrap();
    // The output with given types, that with profiled types, and what profiling found.
    let layers = |module: &Arc<Module>, half_widths| {
        let attention = SparseAttention::new(module, 1, spec.heads).unwrap();
        let workspace = Workspace::allocate(device, attention.workspace_bytes()).unwrap();
        let mut placed =
            DeviceLayer::upload(device, &spec.layout, &inputs, Placement::all(Arrangement::TokensFirst)).unwrap();
        placed.layer.half_widths = half_widths;
        let outs = [HeadTypes::Given(given.address()), HeadTypes::Profiled].map(|types| {
            // SAFETY: all memory is this function's, and outlives the work.
            unsafe { attention.forward(Stream::DEFAULT, &placed.layer, types, &workspace).unwrap() };
            placed.out.download(device).unwrap().0
        });
        (outs, attention.read_profile(&workspace).unwrap())
    };
    let own = layers(&module, None);
    let video = spec.layout.video_tokens();
    for [spatial, temporal] in [[1, video], [13, 40]] {
        let widths = spec.to_builder().spatial(Width::Tokens(spatial)).temporal(Width::Tokens(temporal));
        let expected = layers(&Module::load(device, &widths.build().unwrap()).unwrap(), None);
        assert_ne!(expected, own);
        assert_eq!(layers(&module, Some([spatial, temporal])), expected, "{spatial} and {temporal}");
        assert_eq!(layers(&module, None), own, "after {spatial} and {temporal}");
    }
    let attention = SparseAttention::new(&module, 1, spec.heads).unwrap();
    let workspace = Workspace::allocate(device, attention.workspace_bytes()).unwrap();
    for wrong in [[0, 1], [1, 0], [video + 1, 1], [1, u32::MAX]] {
        let layer = Layer { half_widths: Some(wrong), ..Layer::default() };
        let error = attention.launches(&layer, HeadTypes::Profiled, &workspace).err().unwrap().to_string();
        assert!(error.contains("half_widths") && error.contains(&format!("1 to {video}")), "{error}");
    }
}

/// Any subset of the heads gives, bit for bit, what all heads give for them.
#[test]
fn a_subset_of_heads() {
    let module = module("tiny_text_last");
    let inputs = Inputs::random(module.spec(), 1, 2, 6);
    let second = |tokens: &Tokens| {
        let mut one = Tokens::zeros(tokens.dtype, [1, tokens.rows, 1, tokens.head_dim]);
        one.fill(|batch, row, _, values| values.copy_from_slice(&tokens.row(batch, row, 1)));
        one
    };
    let subset = Inputs { q: second(&inputs.q), k: second(&inputs.k), v: second(&inputs.v), ..inputs.clone() };
    let types = module.device().upload(&[1, 0, 0, 0, 2, 0, 0, 0]).unwrap();
    let all = forward(&module, &inputs, HeadTypes::Given(types.address()));
    let one = forward(&module, &subset, HeadTypes::Given(types.address() + 4));
    assert_eq!(second(&all), one);
}

/// More heads than the spec's give, bit for bit, what each gives alone. They are more than a warp
/// of pack holds of a row, which is planned from the spec's, and the types of more than one step.
#[test]
fn more_heads_than_the_spec() {
    let module = module("tiny_text_last");
    let heads = 37;
    let inputs = Inputs::random(module.spec(), 2, heads, 6);
    let types: Vec<u32> = (0..2 * heads as u32).map(|index| index % 3).collect();
    let bytes: Vec<u8> = types.iter().flat_map(|head| head.to_le_bytes()).collect();
    let types = module.device().upload(&bytes).unwrap();
    let all = forward(&module, &inputs, HeadTypes::Given(types.address()));
    for (item, head) in [(0, 0), (0, 3), (0, 4), (1, 5), (1, 35), (1, 36)] {
        let of = |tokens: &Tokens| {
            let mut one = Tokens::zeros(tokens.dtype, [1, tokens.rows, 1, tokens.head_dim]);
            one.fill(|_, row, _, values| values.copy_from_slice(&tokens.row(item, row, head)));
            one
        };
        let of_item = |table: &[f32]| table.chunks_exact(table.len() / 2).nth(item).unwrap().to_vec();
        let tables = inputs.rope.as_ref().unwrap();
        let rope = RopeTables { items: 1, cos: of_item(&tables.cos), sin: of_item(&tables.sin) };
        let (q, k, v) = (of(&inputs.q), of(&inputs.k), of(&inputs.v));
        let one = Inputs { q, k, v, rope: Some(rope), ..inputs.clone() };
        let own_type = types.address() + (item * heads + head) as u64 * 4;
        assert_eq!(of(&all), forward(&module, &one, HeadTypes::Given(own_type)), "item {item}, head {head}");
    }
    passes(
        "tiny_text_last",
        &[Case { extent: CaseExtent::More, ..Case::new(CaseTypes::Profiled, CaseContent::Planted) }],
    );
}

/// The output may take the place of Q.
#[test]
fn in_place() {
    let module = module("tiny_layer_half");
    let inputs = Inputs::random(module.spec(), 2, 2, 7);
    let apart = forward(&module, &inputs, HeadTypes::Profiled);
    let device = module.device();
    let attention = SparseAttention::new(&module, 2, 2).unwrap();
    let workspace = Workspace::allocate(device, attention.workspace_bytes()).unwrap();
    let mut placed =
        DeviceLayer::upload(device, &module.spec().layout, &inputs, Placement::all(Arrangement::TokensFirst)).unwrap();
    let q = DeviceTensor::upload(device, &inputs.q, Arrangement::TokensFirst).unwrap();
    (placed.layer.q, placed.layer.out) = (q.tensor(), q.tensor());
    // SAFETY: all memory is this function's, and outlives the work.
    unsafe { attention.forward(Stream::DEFAULT, &placed.layer, HeadTypes::Profiled, &workspace).unwrap() };
    assert_eq!(q.download(device).unwrap().0, apart);
}

/// So may that of text which is apart: pack has read all of it before attention writes.
#[test]
fn in_place_of_text() {
    let module = module("tiny_text_last");
    let (layout, element) = (module.spec().layout, u64::from(module.spec().dtype.bytes()));
    let inputs = Inputs::random(module.spec(), 2, 2, 8);
    let expected = forward(&module, &inputs, HeadTypes::Profiled);
    let device = module.device();
    let attention = SparseAttention::new(&module, 2, 2).unwrap();
    let workspace = Workspace::allocate(device, attention.workspace_bytes()).unwrap();
    let mut placed = DeviceLayer::upload(device, &layout, &inputs, Placement::all(Arrangement::TokensFirst)).unwrap();
    // The text lies where other rows are written: Q's in the first rows of the output, K's in the
    // next.
    let (video, text) = (layout.video_tokens() as usize, layout.after as usize);
    let mut rows = inputs.q.clone();
    for item in 0..2 {
        for (first, tokens) in [(0, &inputs.q), (text, &inputs.k)] {
            let (to, from) = (rows.index(item, first, 0), tokens.index(item, video, 0));
            let elements = rows.index(0, text, 0);
            rows.bits[to..to + elements].copy_from_slice(&tokens.bits[from..from + elements]);
        }
    }
    let out = DeviceTensor::upload(device, &rows, Arrangement::TokensFirst).unwrap();
    let from_row =
        |tensor: Tensor, row: usize| Tensor { data: tensor.data + row as u64 * tensor.row * element, ..tensor };
    let v = from_row(placed.layer.v, video);
    placed.layer.after.qkv = Some([out.tensor(), from_row(out.tensor(), text), v]);
    placed.layer.out = out.tensor();
    // SAFETY: all memory is this function's, and outlives the work.
    unsafe { attention.forward(Stream::DEFAULT, &placed.layer, HeadTypes::Profiled, &workspace).unwrap() };
    assert_eq!(out.download(device).unwrap().0, expected);
}

/// Calls that the schedule keeps dense are dense, and borrowed memory serves as a workspace.
#[test]
fn the_schedule_and_a_borrowed_workspace() {
    let module = module("tiny_text_rope");
    let attention = SparseAttention::new(&module, 1, 2).unwrap();
    assert_eq!(attention.head_types(0, 5), HeadTypes::Dense);
    assert_eq!(attention.head_types(1, 1), HeadTypes::Dense);
    assert_eq!(attention.head_types(1, 2), HeadTypes::Profiled);
    let inputs = Inputs::random(module.spec(), 1, 2, 8);
    let device = module.device();
    let memory = device.allocate(attention.workspace_bytes()).unwrap();
    device.fill(Stream::DEFAULT, &memory, POISON).unwrap();
    // SAFETY: the buffer lives until the end, and nobody else uses it.
    let workspace = unsafe { Workspace::borrow(device, memory.address(), memory.bytes()) };
    let placed =
        DeviceLayer::upload(device, &module.spec().layout, &inputs, Placement::all(Arrangement::TokensFirst)).unwrap();
    // SAFETY: all memory is this function's, and outlives the work.
    unsafe { attention.forward(Stream::DEFAULT, &placed.layer, attention.head_types(0, 0), &workspace).unwrap() };
    let zeros = device.upload(&[0; 8]).unwrap();
    let expected = forward(&module, &inputs, HeadTypes::Given(zeros.address()));
    assert_eq!(placed.out.download(device).unwrap().0, expected);

    // The types that a profiled call left in the workspace serve the next.
    let forward = |types| {
        // SAFETY: as above.
        unsafe { attention.forward(Stream::DEFAULT, &placed.layer, types, &workspace).unwrap() };
        placed.out.download(device).unwrap().0
    };
    let profiled = forward(HeadTypes::Profiled);
    assert_eq!(
        forward(HeadTypes::Given(workspace.address() + attention.workspace_layout().head_types.start)),
        profiled
    );
}

/// Heads that are asked to be dense are dense. The others have the types that profiling finds.
#[test]
fn dense_heads() {
    let module = module("tiny_text_last");
    let inputs = Inputs::planted(module.spec(), 1, 2, 11);
    for (dense, expected) in [
        (&[][..], [HeadType::Spatial, HeadType::Temporal]),
        (&[1], [HeadType::Spatial, HeadType::Dense]),
        (&[0, 1, 0], [HeadType::Dense, HeadType::Dense]),
    ] {
        let found = run_layer(&module, &inputs, dense, &|_, _| ()).unwrap();
        assert_eq!(found.types, expected);
        assert!(found.report.ok);
        let types: Vec<u8> = expected.iter().flat_map(|&head| (head as u32).to_le_bytes()).collect();
        let types = module.device().upload(&types).unwrap();
        assert_eq!(found.out, forward(&module, &inputs, HeadTypes::Given(types.address())));
    }
    let error = run_layer(&module, &inputs, &[2], &|_, _| ()).err().unwrap().to_string();
    assert!(error.contains("head 2") && error.contains("0 to 1"), "{error}");
}

/// NaN in V reaches the rows that see it and no other, invalid text included.
#[test]
fn nan_is_carried() {
    let module = module("tiny_text_last");
    let spec = module.spec();
    let mut inputs = Inputs::random(spec, 1, 2, 5);
    inputs.after.lengths = Some(vec![10]);
    let (sick, invalid) = (40, 130);
    for row in [sick, invalid] {
        for head in 0..2 {
            let element = inputs.v.index(0, row, head);
            inputs.v.bits[element] = narrow(spec.dtype, f64::NAN);
        }
    }
    let types = module.device().upload(&[1, 0, 0, 0, 2, 0, 0, 0]).unwrap();
    let out = forward(&module, &inputs, HeadTypes::Given(types.address()));
    for (head, head_type) in [HeadType::Spatial, HeadType::Temporal].into_iter().enumerate() {
        let valid = inputs.valid(&spec.layout, 0);
        let mask = framestride_check::reference::Mask::new(&spec.layout, head_type, valid);
        for row in 0..spec.layout.sequence() as usize {
            let found = widen(spec.dtype, out.bits[out.index(0, row, head)]);
            // 0 x NaN is NaN on the tensor cores. So rows of the same tile may catch it, and rows
            // beyond may not.
            if mask.sees(row, sick) {
                assert!(found.is_nan(), "head {head} row {row}");
            }
            if row >= 125 {
                assert_eq!(found, 0.0, "invalid text, head {head} row {row}");
            }
        }
    }
}

/// Inputs that are made by hand, and whose parts do not fit each other, are refused.
#[test]
fn inputs_that_contradict_themselves() {
    let module = Module::load(&Device::emulator(), &Spec::shipped("tiny_text_last").unwrap()).unwrap();
    let right = Inputs::random(module.spec(), 1, 2, 1);
    type Change = fn(&mut Inputs);
    let changes: [(&str, Change); 5] = [
        ("fewer bits than the shape says", |inputs| inputs.q.bits.truncate(100)),
        ("more bits than the shape says", |inputs| inputs.v.bits.push(0)),
        ("another type", |inputs| inputs.k.dtype = Dtype::F16),
        ("a shape that overflows", |inputs| {
            (inputs.q.batch, inputs.k.batch, inputs.v.batch) = (1 << 60, 1 << 60, 1 << 60)
        }),
        ("a scale that overflows", |inputs| inputs.scale = Some(3e38)),
    ];
    let mut messages = String::new();
    for (name, change) in changes {
        let mut inputs = right.clone();
        change(&mut inputs);
        let error = run_layer(&module, &inputs, &[], &|_, _| ()).err().unwrap_or_else(|| panic!("{name} was accepted"));
        writeln!(messages, "## {name}\n{error}").unwrap();
    }
    insta::assert_snapshot!(messages);
}
