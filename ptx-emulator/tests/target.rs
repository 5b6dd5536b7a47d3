//! What a module's `.target` allows. With a ptxas, ptxas must agree on every line.

mod common;

use ptx_emulator::Module;

/// A module of one instruction.
fn text(version: &str, target: &str, instruction: &str) -> String {
    format!(
        ".version {version}
        .target {target}
        .address_size 64
        .visible .entry test(.param .u64 in) .maxntid 128 {{
        .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<9>; .reg .f32 %f<9>; .reg .b64 %rd<9>;
        .shared .align 128 .b8 box[1024]; ld.param.u64 %rd2, [in]; mov.u32 %r2, box;
        {instruction};
        ret; }}"
    )
}

/// Parses a module of one instruction. The error is empty if there is none.
fn parsed(version: &str, target: &str, instruction: &str) -> String {
    let text = text(version, target, instruction);
    let found = Module::parse("test", &text);
    if let Some(said) = common::ptxas(&text) {
        let (ours, theirs) = (found.is_ok(), said.is_ok());
        assert_eq!(ours, theirs, "{instruction} for {target}: {:?}, but ptxas says {said:?}", found.err());
    }
    found.err().map(|error| error.to_string()).unwrap_or_default()
}

#[test]
fn what_ampere_has() {
    for instruction in [
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r3, %r4, %r5, %r6}, {%r7, %r8}, {%f1, %f2, %f3, %f4}",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r3, %r4, %r5, %r6}, [%r2]",
        "cp.async.cg.shared.global.L2::128B [%r2], [%rd2], 16, 3; cp.async.commit_group; cp.async.wait_group 0",
        "mbarrier.arrive.shared.b64 %rd5, [%r2]",
        "mbarrier.test_wait.parity.shared.b64 %p1, [%r2], 0",
        "ld.shared::cta.u32 %r3, [%r2]",
        "ld.global.nc.L1::no_allocate.L2::128B.b32 %r3, [%rd2]",
        "createpolicy.fractional.L2::evict_first.b64 %rd5, 1.0",
        "fence.acq_rel.cta",
        "redux.sync.max.u32 %r3, %r4, -1",
        "bar.sync 1, 64",
        "fma.rn.bf16x2 %r3, %r4, %r5, %r6",
        "max.bf16x2 %r3, %r4, %r5",
        "max.NaN.f32 %f1, %f2, %f3",
        "add.f16x2 %r3, %r4, %r5",
        "ex2.approx.f16x2 %r3, %r4",
        "cvt.rn.bf16x2.f32 %r3, %f1, %f2",
        "cvt.f32.bf16 %f1, %h1",
        "atom.global.add.noftz.f16x2 %r3, [%rd2], %r4",
    ] {
        assert_eq!(parsed("8.3", "sm_80", instruction), "");
    }
}

#[test]
fn what_later_gpus_have() {
    // Each with the first target that has it, of those that the test asks.
    let targets = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_90a"];
    for (first, instruction) in [
        ("sm_90a", "wgmma.fence.sync.aligned"),
        ("sm_90a", "setmaxnreg.dec.sync.aligned.u32 24"),
        ("sm_90", "cp.async.bulk.commit_group"),
        ("sm_90", "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd2], 16, [%r2]"),
        ("sm_90", "mbarrier.try_wait.parity.shared.b64 %p1, [%r2], 0"),
        ("sm_90", "mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 16"),
        ("sm_90", "mbarrier.arrive.shared.b64 _, [%r2], 2"),
        ("sm_90", "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r2], 16"),
        ("sm_90", "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r2], 16"),
        ("sm_90", "fence.proxy.async.shared::cta"),
        ("sm_90", "fence.mbarrier_init.release.cluster"),
        ("sm_90", "fence.acq_rel.cluster"),
        ("sm_90", "elect.sync %r3|%p1, -1"),
        ("sm_90", "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2], {%r3}"),
        ("sm_90", "griddepcontrol.wait"),
        ("sm_90", "mapa.u64 %rd5, %rd2, 0"),
        ("sm_90", "ld.shared::cluster.u32 %r3, [%r2]"),
        ("sm_90", "mov.u32 %r3, %cluster_ctarank"),
        ("sm_90", "red.global.add.v2.f32 [%rd2], {%f1, %f2}"),
        ("sm_90", "atom.global.add.noftz.bf16x2 %r3, [%rd2], %r4"),
        ("sm_90", "mul.rn.bf16x2 %r3, %r4, %r5"),
        ("sm_90", "ex2.approx.ftz.bf16x2 %r3, %r4"),
        ("sm_90", "setp.lt.bf16 %p1, %h1, %h2"),
        ("sm_90", "cvt.rn.bf16.s32 %h1, %r3"),
    ] {
        let least = targets.iter().position(|target| *target == first).expect("a target of the list");
        for (i, target) in targets.into_iter().enumerate() {
            let error = parsed("8.3", target, instruction);
            if i < least {
                let expected =
                    format!("test:7: the module's target {target} does not have this instruction: it needs sm_");
                assert!(error.starts_with(&expected), "{instruction} for {target}: {error:?}");
            } else {
                assert_eq!(error, "", "for {target}");
            }
        }
    }
}

#[test]
fn targets_and_versions() {
    for (version, target) in
        [("7.0", "sm_80"), ("7.1", "sm_86"), ("8.0", "sm_90a"), ("8.7", "sm_120"), ("8.8", "sm_120f")]
    {
        assert_eq!(parsed(version, target, "bar.sync 0"), "");
    }
    for (version, target, words) in [
        ("8.3", "sm_75a", "test:2: target `sm_75a` is unknown: sm_80 and later GPUs are known"),
        ("8.3", "sm_80a", "target `sm_80a` is unknown"),
        ("8.8", "sm_90f", "target `sm_90f` is unknown"),
        ("7.0", "sm_86", "test:2: PTX 7.0 does not know target sm_86: it needs .version 7.1"),
        ("7.8", "sm_90a", "it needs .version 8.0"),
        ("8.3", "sm_120", "it needs .version 8.7"),
    ] {
        let error = parsed(version, target, "bar.sync 0");
        assert!(error.starts_with("test:2: ") && error.contains(words), "{error}");
    }
    let refused = |text: &str| Module::parse("test", text).expect_err(text).to_string();
    assert_eq!(refused(".version 8.3"), "test:1: the module has no .target");
    assert_eq!(refused(".version eight"), "test:1: expected a version such as 8.3, found `eight`");
    assert_eq!(
        refused(".version 8.3 .target sm_80 .address_size 32"),
        "test:1: the address size is 32: 64 to 64 is allowed"
    );
    assert!(Module::parse("test", ".version 8.3 .target sm_90a, debug .address_size 64").is_ok());
    // Eight bits came with Ada.
    let error = parsed("8.3", "sm_86", "cvt.rn.satfinite.e4m3x2.f32 %h1, %f1, %f2");
    assert!(error.contains("it needs sm_89 or later"), "{error}");
    // Hopper's products are not those of later GPUs.
    assert!(parsed("8.7", "sm_120a", "wgmma.fence.sync.aligned").contains("it needs sm_90a"));
    assert_eq!(parsed("8.7", "sm_120a", "setmaxnreg.dec.sync.aligned.u32 24"), "");
}
