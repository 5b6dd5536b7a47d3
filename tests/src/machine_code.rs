//! What the machine code of templates must and must not have, whatever spec is filled in.

use std::fmt::Write;
use std::sync::OnceLock;

use framestride::Spec;
use framestride::shapes::blocks::Tiles;
use framestride::shapes::spec::Compute;
use framestride_builder::{Arch, ptx, toolchain::CudaTools};
use rayon::prelude::*;

use crate::sass::Listing;
use crate::{Model, checkout, model, models, random};

/// How many random specs are looked at. `FRAMESTRIDE_RANDOM_SPECS` gives another number.
const RANDOM_SPECS: usize = 12;

/// What takes most registers in **pack** comes together here. ptxas once spilled three, for either
/// head dim.
const MOST_REGISTERS: &str = r#"
name = "random_most_registers"
[video]
frames = 21
tokens_per_frame = 1560
[before]
tokens = 77
[after]
tokens = 131
[attention]
heads = 24
head_dim = 128
[qk_norm]
kind = "layer"
over = "head"
eps = 1e-6
[rope]
pairs = "half"
before = true
after = true
[masks.spatial]
half_width = 1000
[masks.temporal]
half_width = 1000
"#;

/// Random specs, and [`MOST_REGISTERS`], assembled by the first test that asks.
fn random_models() -> &'static [Model] {
    static MODELS: OnceLock<Vec<Model>> = OnceLock::new();
    MODELS.get_or_init(|| {
        let count = std::env::var("FRAMESTRIDE_RANDOM_SPECS").ok().and_then(|count| count.parse().ok());
        let seed = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(1, |time| time.as_nanos() as u64);
        println!("seed {seed}");
        let random = (0..count.unwrap_or(RANDOM_SPECS)).map(|index| random_spec(index, seed));
        let most = [128, 64].map(|dim| MOST_REGISTERS.replace("head_dim = 128", &format!("head_dim = {dim}")));
        let texts: Vec<String> = random.chain(most).collect();
        let make = |text: &String| {
            let spec = Spec::parse("random", text).unwrap_or_else(|error| panic!("{text}\n{error}"));
            Model::of(&spec).unwrap_or_else(|error| panic!("{text}\n{error}"))
        };
        texts.par_iter().map(make).collect()
    })
}

/// The text of a random spec: any operators, from a few tokens to the most that models have.
fn random_spec(index: usize, seed: u64) -> String {
    let mut state = seed.wrapping_add(index as u64);
    let mut below = |limit: u32| (random(&mut state) >> 32) as u32 % limit;
    // 1 to 2^most, small ones as often as large ones.
    let logarithmic = |below: &mut dyn FnMut(u32) -> u32, most: u32| {
        let bits = 1 + below(most);
        1 + below(1 << bits)
    };
    let (frames, tokens) = (logarithmic(&mut below, 7), logarithmic(&mut below, 12));
    let head_dim = [64, 128][below(2) as usize];
    let mut text = format!("name = \"random_{index}\"\n[video]\nframes = {frames}\ntokens_per_frame = {tokens}\n");
    let sides: Vec<&str> = ["before", "after"].into_iter().filter(|_| below(2) == 0).collect();
    for side in &sides {
        let _ = writeln!(text, "[{side}]\ntokens = {}", logarithmic(&mut below, 10));
    }
    let (heads, dtype) = (1 + below(64), ["bf16", "f16"][below(2) as usize]);
    let _ = writeln!(text, "[attention]\nheads = {heads}\nhead_dim = {head_dim}\ndtype = \"{dtype}\"");
    if head_dim == 128 && below(2) == 0 {
        text += "compute = \"e4m3\"\n";
        if below(2) == 0 {
            text += "[precision]\nlargest_error = 0.05\n";
        }
    }
    if below(4) != 0 {
        let (kind, over) = (["rms", "layer"][below(2) as usize], ["head", "heads"][below(2) as usize]);
        let _ = writeln!(text, "[qk_norm]\nkind = \"{kind}\"\nover = \"{over}\"\neps = 1e-6");
    }
    if below(4) != 0 {
        let (pairs, per_head) = (["interleaved", "half"][below(2) as usize], below(2) == 0);
        let _ = writeln!(text, "[rope]\npairs = \"{pairs}\"\nper_head = {per_head}");
        for side in sides {
            let _ = writeln!(text, "{side} = {}", below(2) == 0);
        }
        if below(2) == 0 {
            let _ = writeln!(text, "channels = {}", 16 * (1 + below(head_dim / 16)));
        }
    }
    let half_widths = [1 + below(frames * tokens), 1 + below(frames * tokens)];
    let _ = writeln!(
        text,
        "[masks.spatial]\nhalf_width = {}\n[masks.temporal]\nhalf_width = {}",
        half_widths[0], half_widths[1]
    );
    let (sinks, rows) = (below(frames.min(3)), 1 + below((frames * tokens).min(1024)));
    let _ = writeln!(text, "[sink]\nframes = {sinks}\n[profile]\nrows = {rows}");
    text
}

/// Fails with every complaint about any model.
fn gate(what: &str, check: impl Fn(&Model) -> Vec<String> + Sync) {
    let models: Vec<&Model> = models().iter().chain(random_models()).collect();
    let complaints = |model: &&Model| {
        let spec = model.kernels.spec();
        // The text of a random spec is found nowhere else.
        let name = if spec.name.starts_with("random") { &spec.source.text } else { &spec.name };
        check(model).into_iter().map(move |wrong| format!("{name}: {wrong}")).collect::<Vec<_>>()
    };
    let wrong: Vec<String> = models.par_iter().flat_map_iter(complaints).collect();
    assert!(wrong.is_empty(), "{what}:\n{}", wrong.join("\n"));
}

/// The main loops of a template's attention are those of kernels that know their spec as constants:
/// as many, with the same exponentials, and at most 3% longer. So is its profile as a whole.
#[test]
fn main_loops_are_as_short_as_with_constants() {
    const SPECS: [&str; 4] = ["hunyuan_video_720p", "wan_14b_720p", "cogvideox_1_5_5b_768x1360", "ltx_video_512x704"];
    let files = SPECS.map(|name| checkout(&format!("shapes/models/{name}.toml")));
    let built = framestride_builder::Kernels::from_specs(files).build_all().unwrap_or_else(|error| panic!("{error}"));
    for built in built {
        let (own, _) = Listing::from_ptx(&built.name, &built.ptx, Arch::SM_90A.name, &CudaTools::find())
            .unwrap_or_else(|error| panic!("{error}"));
        let filled = &model(&built.name).machine_code;
        let function = |listing: &'_ Listing, entry: &str| {
            listing.function(entry).cloned().unwrap_or_else(|| panic!("{}: no {entry}", built.name))
        };
        let (own_loops, filled_loops) =
            (function(&own, "attention").overlaps(), function(filled, "attention").overlaps());
        assert!(!own_loops.is_empty() && own_loops.len() == filled_loops.len(), "{}: {own_loops:?}", built.name);
        for (own, filled) in own_loops.into_iter().zip(filled_loops) {
            assert_eq!(own.between_waits, filled.between_waits, "{}", built.name);
            let (own, filled) = (own.main_loop.len(), filled.main_loop.len());
            assert!(100 * filled <= 103 * own, "{}: {filled} instructions for {own}", built.name);
        }
        // The loops of profile have other waits, so all of it is compared.
        let [own, filled] = [&own, filled].map(|listing| function(listing, "profile").instructions.len());
        assert!(100 * filled <= 103 * own, "{}, profile: {filled} instructions for {own}", built.name);
    }
}

/// A register that is spilled or lies on the stack costs a trip to memory each time. If the
/// fragment of a product lies there, ptxas serialises the product and says so. It also says when it
/// drops a `setmaxnreg` (C7508 to C7519). So no remark is expected at all.
#[test]
fn no_stack_no_spill_no_remark() {
    gate("ptxas reports what no kernel may have", |model| {
        let mut wrong = Vec::new();
        for kernel in &model.kernels.manifest().kernels {
            let Some(report) = model.resources.get(&kernel.entry) else {
                wrong.push(format!("{} has no report", kernel.entry));
                continue;
            };
            for (what, bytes) in
                [("stack", report.stack), ("spill stores", report.spill_stores), ("spill loads", report.spill_loads)]
            {
                if bytes != 0 {
                    wrong.push(format!("{} has {bytes} bytes of {what}", kernel.entry));
                }
            }
            wrong.extend(report.messages.iter().map(|message| format!("{}: {message}", kernel.entry)));
        }
        wrong
    });
}

/// A call would be a bounds check with a message, an integer division or a memcpy.
#[test]
fn no_call() {
    gate("functions are called", |model| {
        let calls = ptx::calls(model.kernels.ptx());
        let mut wrong: Vec<String> =
            calls.iter().map(|(line, call)| format!("line {line} of the PTX: {call}")).collect();
        for kernel in &model.kernels.manifest().kernels {
            match model.machine_code.function(&kernel.entry) {
                Some(function) if function.count("CALL") == 0 => {}
                Some(function) => wrong.push(format!("{} has {} CALL", kernel.entry, function.count("CALL"))),
                None => wrong.push(format!("{} has no machine code", kernel.entry)),
            }
        }
        wrong.extend((model.machine_code.functions.len() != model.kernels.manifest().kernels.len()).then(|| {
            let names: Vec<&str> = model.machine_code.functions.iter().map(|function| function.name.as_str()).collect();
            format!("the machine code has the functions {}, more than the entries", names.join(", "))
        }));
        wrong
    });
}

/// Each round of attention's main loop starts S = Q Kᵀ of a tile and O += P V of the tile before.
/// It waits for the first, and computes the softmax while the second runs. Every weight of the tile
/// is an exponential between the two waits, and there is no other one. (A tile has 64 rows by
/// `key_rows`, for 128 threads.) ptxas once moved all of them below the second wait.
///
/// A sequence of two tiles has no such loop. Its second round is straight code, and these kernels
/// need not be fast for it.
#[test]
fn the_softmax_runs_under_the_products() {
    gate("the softmax does not stand between the two waits of the main loop", |model| {
        let of_spec = Compute::ALL.into_iter().zip(model.kernels.spec().precisions()).filter(|&(_, has)| has);
        of_spec.flat_map(|(compute, _)| wrong_softmax(model, compute)).collect()
    });
}

/// What is wrong with the main loops of attention in one precision.
fn wrong_softmax(model: &Model, compute: Compute) -> Vec<String> {
    let spec = model.kernels.spec();
    let tiles = Tiles::new(Arch::SM_90A, spec.head_dim, compute);
    if spec.layout.sequence() <= 2 * tiles.key_rows {
        return Vec::new();
    }
    let in_8_bits = compute == Compute::E4m3;
    let name = if in_8_bits { "attention_e4m3" } else { "attention" };
    let Some(attention) = model.machine_code.function(name) else {
        return vec![format!("{name} has no machine code")];
    };
    // One loop is for rows with offsets, and one for plain rows.
    let loops = attention.overlaps();
    let exponentials = (tiles.key_rows / 2) as usize;
    // A product takes 32 bytes of its inner dimension at a time: head_dim for the scores,
    // key_rows for the output.
    let depth = if in_8_bits { 32 } else { 16 };
    let products = (spec.head_dim / depth + tiles.key_rows / depth) as usize;
    // Each loop has a first tile before it. Where offsets change, both rows have a factor, and
    // in 8 bits one more that changes what was added before.
    let factors = if in_8_bits { 4 } else { 2 };
    let mut expected = vec![
        ("loops with a wait for one group and a wait for none", loops.len(), 2),
        ("MUFU.EX2 in the kernel", attention.count("MUFU.EX2"), 4 * exponentials + factors),
    ];
    for overlap in &loops {
        let moved = &attention.instructions[overlap.main_loop.clone()];
        let moved = moved.iter().filter(|instruction| instruction.opcode.starts_with("R2UR")).count();
        expected.extend([
            // The number of the stage needs a few. If ptxas does not see that the loop is
            // uniform, it makes dozens.
            ("more than 3 R2UR in the loop", moved.saturating_sub(3), 0),
            ("MUFU.EX2 in the loop", overlap.exponentials, exponentials),
            ("products in the loop", overlap.products, products),
        ]);
        // In 8 bits the weights are made behind both waits, beside the sums of the output. The
        // other warpgroup's products run then.
        if !in_8_bits {
            expected.push(("MUFU.EX2 between the waits", overlap.between_waits, exponentials));
        }
    }
    let wrong = expected.into_iter().filter(|(_, found, expected)| found != expected);
    wrong.map(|(what, found, expected)| format!("{name}: {found} {what}, expected {expected}")).collect()
}
