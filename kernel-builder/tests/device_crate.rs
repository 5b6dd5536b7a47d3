//! Builds a device crate that is written by hand (`fixtures/device`): what comes out, and what is
//! said of a wrong one. The tests need a device compiler.

use std::fs;
use std::path::{Path, PathBuf};

use framestride_builder::llvm_ir::FinishError;
use framestride_builder::{Arch, BuildError, Built, Kernels, Spec, ptx};

/// A copy of the fixture whose library is changed by `edit`. It always lies at the same place in
/// the target folder, so that its builds are kept.
fn device(edit: impl Fn(&str) -> String) -> (std::sync::MutexGuard<'static, ()>, PathBuf) {
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/device");
    let copy = Path::new(env!("CARGO_TARGET_TMPDIR")).join("device");
    fs::create_dir_all(copy.join("src")).unwrap();
    fs::copy(fixture.join("Cargo.toml"), copy.join("Cargo.toml")).unwrap();
    let library = fs::read_to_string(fixture.join("src/lib.rs")).unwrap();
    fs::write(copy.join("src/lib.rs"), edit(&library)).unwrap();
    (guard, copy)
}

fn build(edit: impl Fn(&str) -> String) -> Result<Built, BuildError> {
    let (_guard, folder) = device(edit);
    Kernels::from_crate(folder).arch(Arch::SM_90A).build()
}

/// `text` with `from` replaced by `to`. `from` must be there.
fn replaced(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "the fixture has no `{from}`");
    text.replace(from, to)
}

/// The body of one entry.
fn body<'a>(ptx: &'a str, entry: &str) -> &'a str {
    let (_, rest) = ptx.split_once(&format!(".entry {entry}(")).expect("the entry is there");
    rest.split(".entry ").next().unwrap()
}

#[test]
fn a_barrier_between_branches_stays_one() {
    let built = build(str::to_string).unwrap();
    let histogram = ptx::histogram(body(&built.ptx, "barrier_between"));
    assert_eq!(histogram.get("bar.sync"), Some(&1), "{}", built.ptx);
    assert_eq!(histogram.get("st.volatile.global.b32"), Some(&2));
}

#[test]
fn a_barrier_that_only_some_lanes_reach_is_refused() {
    let error = build(|library| {
        let lane = "let lane: u32;\n        asm!(\"mov.u32 {}, %laneid;\", out(reg32) lane);\n        if lane < 7 {";
        replaced(
            library,
            "asm!(\"bar.sync 0;\");\n        out.write",
            &format!("{lane} asm!(\"bar.sync 0;\"); }}\n        out.write"),
        )
    });
    let Err(BuildError::Convergence { parted, .. }) = &error else { panic!("{error:?}") };
    assert_eq!((parted.function.as_str(), parted.instruction.1.as_str()), ("second", "bar.sync 0"));
    let message = error.unwrap_err().to_string();
    assert!(message.contains("may part them") && message.contains("cuda::warp::uniform"), "{message}");
}

#[test]
fn a_profile_of_the_crate_itself_changes_nothing() {
    let plain = build(str::to_string).unwrap().ptx;
    let (_guard, folder) = device(str::to_string);
    let manifest = fs::read_to_string(folder.join("Cargo.toml")).unwrap();
    let profile = "[profile.release]\nincremental = true\nopt-level = 0\npanic = \"abort\"\n\
                   [profile.release.package.\"*\"]\nopt-level = 0\ndebug-assertions = true\n";
    fs::write(folder.join("Cargo.toml"), manifest + profile).unwrap();
    assert_eq!(Kernels::from_crate(folder).build().unwrap().ptx, plain);
}

#[test]
fn launch_tables_reach_ptx_and_manifest() {
    let built = build(str::to_string).unwrap();
    assert_eq!(ptx::entries(&built.ptx), ["barrier_between", "second"]);
    assert_eq!(ptx::bound(&built.ptx, "barrier_between", "maxntid"), Some(256));
    assert_eq!(ptx::bound(&built.ptx, "barrier_between", "minnctapersm"), Some(2));
    assert_eq!(ptx::bound(&built.ptx, "second", "maxntid"), Some(128));
    assert!(!built.ptx.contains("framestride_launch"), "the tables must leave the module");
    assert_eq!((built.name.as_str(), built.manifest.spec.as_ref()), ("handwritten-device", None));
    let [first, second] = &built.manifest.kernels[..] else { panic!("{:?}", built.manifest.kernels) };
    assert_eq!((first.threads, first.min_blocks, first.shared_bytes, first.params_bytes), (256, 2, 0, 12));
    assert_eq!((second.threads, second.shared_bytes), (128, 1024));
    let params: Vec<_> = first.params.iter().map(|p| (p.name.as_str(), p.ty.as_str(), p.offset, p.bytes)).collect();
    assert_eq!(params, [("out", "*mut u32", 0, 8), ("c", "u32", 8, 4)]);
}

#[test]
fn only_sources_of_the_crate_are_watched() {
    let built = build(str::to_string).unwrap();
    let names: Vec<_> =
        built.inputs.iter().map(|path| path.strip_prefix(env!("CARGO_TARGET_TMPDIR")).unwrap()).collect();
    assert_eq!(names, [Path::new("device/Cargo.toml"), Path::new("device/src/lib.rs")]);
}

#[test]
fn an_error_is_the_compilers_own() {
    let error = build(|library| replaced(library, "out.write_volatile(c)", "out.write_volatile(missing)")).unwrap_err();
    let BuildError::Compile { name, manifest, message, kept: None } = &error else { panic!("{error}") };
    assert_eq!(name, "handwritten-device");
    assert!(manifest.ends_with("device/Cargo.toml"));
    assert!(message.contains("error[E0425]: cannot find value `missing`"), "{message}");
    assert!(message.contains("src/lib.rs:") && message.contains("^^^^^^^"), "{message}");
    assert!(error.to_string().contains(message.trim_end()));
}

#[test]
fn a_broken_manifest_is_explained_by_cargo() {
    let (_guard, folder) = device(str::to_string);
    fs::write(folder.join("Cargo.toml"), "[package]\nname = \"broken\"\nedition = \"2025\"\n").unwrap();
    let error = Kernels::from_crate(&folder).build().unwrap_err();
    assert!(matches!(error, BuildError::Crate { .. }), "{error}");
    assert!(error.to_string().contains("device/Cargo.toml") && error.to_string().contains("2025"), "{error}");
    let missing = Kernels::from_crate(folder.join("nowhere")).build().unwrap_err().to_string();
    assert!(missing.starts_with("cannot read ") && missing.contains("device/nowhere"), "{missing}");
}

#[test]
fn a_kernel_without_launch_table_is_refused() {
    let error =
        build(|library| replaced(library, "launch_table!(framestride_launch_second", "launch_table!(second_table"));
    let Err(BuildError::Finish { source, .. }) = error else { panic!("{error:?}") };
    assert_eq!(source, FinishError::EntryWithoutTable { entry: "second".into() });
}

#[test]
fn a_launch_table_of_other_parameters_is_refused() {
    let error = build(|library| replaced(library, r#","params":[{"name":"out","type":"*mut u32"},"#, r#","params":["#));
    let Err(BuildError::Ptx { entry, problem, .. }) = error else { panic!("{error:?}") };
    assert_eq!((entry.as_str(), problem.as_str()), ("barrier_between", "has 2 parameters, its launch table 1"));
}

#[test]
fn machine_code_that_is_no_ptx_is_refused_by_the_tool_that_reads_it() {
    let error = build(|library| replaced(library, "\"bar.sync 0;\"", "\"bar.synk 0;\""));
    // ptxas is the first tool that reads inline assembly. Without it no tool does.
    match (framestride_builder::toolchain::CudaTools::find().ptxas, error) {
        (Some(ptxas), Err(BuildError::Tool { tool, message, .. })) => {
            assert_eq!(tool, ptxas);
            assert!(message.contains("Unknown modifier '.synk'"), "{message}");
        }
        (None, Ok(built)) => assert!(built.manifest.kernels.iter().all(|kernel| kernel.ptxas.is_none())),
        (ptxas, result) => panic!("ptxas {ptxas:?}, but {result:?}"),
    }
}

#[test]
fn bad_specs_and_families_are_told_before_anything_is_built() {
    let bad = Kernels::from_specs(["/nowhere/a.toml", "/nowhere/b.toml"]).build_all().unwrap_err();
    let BuildError::Several(errors) = &bad else { panic!("{bad}") };
    assert!(errors.len() == 2 && errors.iter().all(|error| matches!(error, BuildError::Spec(_))), "{bad}");
    assert!(bad.to_string().contains("/nowhere/a.toml") && bad.to_string().contains("/nowhere/b.toml"), "{bad}");
    let mut changed = Spec::shipped("demo").unwrap();
    changed.heads += 1;
    let refused = Kernels::from_parsed(&changed).build().unwrap_err();
    assert!(matches!(refused, BuildError::Spec(_)), "{refused}");
    assert!(refused.to_string().contains("the fields of spec demo are not what its text says"), "{refused}");
    let in_8_bits = Kernels::from_parsed(&Spec::shipped("tiny_e4m3").unwrap());
    assert_eq!(
        in_8_bits.arch(Arch::SM_80).build().unwrap_err().to_string(),
        "tiny_e4m3: attention.compute is \"e4m3\", of which there are kernels for sm_90a, not for sm_80: build for one of these families, or write compute = \"dtype\" in the spec"
    );
    let unknown = "sm_100".parse::<Arch>().unwrap_err().to_string();
    assert_eq!(unknown, "there are no kernels for `sm_100`: the families are sm_90a, sm_80");
}

#[test]
fn specs_need_names_of_their_own() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("names");
    fs::create_dir_all(&folder).unwrap();
    let spec = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/user/shapes/my_model.toml");
    let copy = folder.join("copy.toml");
    fs::copy(&spec, &copy).unwrap();
    let twice = Kernels::from_specs([&spec, &copy]).build_all().unwrap_err();
    assert!(matches!(&twice, BuildError::SameName { name, .. } if name == "my_model"), "{twice}");
    let none = Kernels::from_specs(Vec::<&Path>::new());
    assert!(matches!(none.clone().build(), Err(BuildError::NoSpec)));
    assert!(none.build_all().unwrap().is_empty());
}

#[test]
fn a_cache_that_cargo_cannot_name_is_refused() {
    let (_guard, folder) = device(str::to_string);
    for name in ["a,b", if cfg!(windows) { "a;b" } else { "a:b" }] {
        let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let error = Kernels::from_crate(&folder).cache_dir(&cache).build().unwrap_err();
        assert!(matches!(error, BuildError::CacheName { .. }), "{error}");
        assert!(error.to_string().contains(name) && error.to_string().contains("FRAMESTRIDE_CACHE"), "{error}");
    }
}

#[test]
fn a_damaged_cache_is_said_to_be() {
    let (_guard, folder) = device(str::to_string);
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("damaged");
    let _ = fs::remove_dir_all(&cache);
    let kernels = || Kernels::from_crate(&folder).cache_dir(&cache);
    kernels().build().unwrap();
    let builds = cache.join("builds").canonicalize().unwrap();
    let entries = builds.read_dir().unwrap().flatten().map(|entry| entry.path());
    let core =
        entries.map(|path| path.join("lib/rustlib/nvptx64-nvidia-cuda/lib/libcore.rlib")).find(|path| path.exists());
    fs::File::options().write(true).open(core.unwrap()).unwrap().set_len(1000).unwrap();
    let library = fs::read_to_string(folder.join("src/lib.rs")).unwrap();
    fs::write(folder.join("src/lib.rs"), library + "// Changed.\n").unwrap();
    let error = kernels().build().unwrap_err().to_string();
    assert!(error.contains("libcore.rlib") && error.contains(&format!("delete {} and", builds.display())), "{error}");
}
