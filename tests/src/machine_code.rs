//! What the machine code of every shipped kernel must and must not have.

use framestride_builder::ptx;

use crate::{Model, wrong_models};

/// Fails with every complaint about any model.
fn gate(what: &str, check: impl Fn(&Model) -> Vec<String> + Sync) {
    let wrong = wrong_models(check);
    assert!(wrong.is_empty(), "{what}:\n{}", wrong.join("\n"));
}

/// A register that is spilled or lies on the stack costs a trip to memory each time. If the
/// fragment of a product lies there, ptxas serialises the product and says so. It also says when it
/// drops a `setmaxnreg` (C7508 to C7519). So no remark is expected at all.
#[test]
fn no_stack_no_spill_no_remark() {
    gate("ptxas reports what no kernel may have", |model| {
        let mut wrong = Vec::new();
        for kernel in &model.built.manifest.kernels {
            let Some(report) = &kernel.ptxas else {
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
        let calls = ptx::calls(&model.built.ptx);
        let mut wrong: Vec<String> =
            calls.iter().map(|(line, call)| format!("line {line} of the PTX: {call}")).collect();
        for kernel in &model.built.manifest.kernels {
            match model.machine_code.function(&kernel.entry) {
                Some(function) if function.count("CALL") == 0 => {}
                Some(function) => wrong.push(format!("{} has {} CALL", kernel.entry, function.count("CALL"))),
                None => wrong.push(format!("{} has no machine code", kernel.entry)),
            }
        }
        wrong.extend((model.machine_code.functions.len() != model.built.manifest.kernels.len()).then(|| {
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
        let tiles = model.spec.tiles();
        if model.spec.layout.sequence() <= 2 * tiles.key_rows {
            return Vec::new();
        }
        let Some(attention) = model.machine_code.function("attention") else {
            return vec!["attention has no machine code".into()];
        };
        // One loop is for rows with offsets, and one for plain rows.
        let loops = attention.overlaps();
        let exponentials = (tiles.key_rows / 2) as usize;
        // A product takes 16 of its inner dimension at a time: head_dim for the scores, key_rows
        // for the output.
        let products = (model.spec.head_dim / 16 + tiles.key_rows / 16) as usize;
        let mut expected = vec![
            ("loops with a wait for one group and a wait for none", loops.len(), 2),
            // Each loop has a first tile before it. Where offsets are lowered, both rows have a
            // factor.
            ("MUFU.EX2 in the kernel", attention.count("MUFU.EX2"), 4 * exponentials + 2),
        ];
        for overlap in &loops {
            let moved = &attention.instructions[overlap.main_loop.clone()];
            let moved = moved.iter().filter(|instruction| instruction.opcode.starts_with("R2UR")).count();
            expected.extend([
                // The number of the stage needs a few. If ptxas does not see that the loop is
                // uniform, it makes dozens.
                ("more than 3 R2UR in the loop", moved.saturating_sub(3), 0),
                ("MUFU.EX2 between the waits", overlap.between_waits, exponentials),
                ("MUFU.EX2 in the loop", overlap.exponentials, exponentials),
                ("HGMMA in the loop", overlap.products, products),
            ]);
        }
        let wrong = expected.into_iter().filter(|(_, found, expected)| found != expected);
        wrong.map(|(what, found, expected)| format!("{found} {what}, expected {expected}")).collect()
    });
}
