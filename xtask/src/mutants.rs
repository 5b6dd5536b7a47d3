//! Plants mistakes in the kernels, one at a time, and expects `framestride verify` to see each on
//! the emulator.
//!
//! The list of mistakes is `tests/mutants/mutants.toml`. For each, a copy of the sources is
//! changed, and the kernels of a small spec are built from it. The unchanged command judges them.
//! Host and kernels compile the same geometry, but the command's reference does not change with the
//! copy.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use framestride_builder::{Arch, Spec};
use serde::Deserialize;

use crate::{cargo, root, run, setup, step};

/// Copies of the sources that are worked on in parallel. Compiling takes one core, the emulator
/// all.
const WORKERS: usize = 2;
/// Seed of the inputs. With a fixed seed a change is seen in every run or in none.
const SEED: &str = "5";
/// What the kernels are built from, and the workspace's files that their Cargo.tomls refer to.
const SOURCES: [&str; 5] = ["Cargo.toml", "Cargo.lock", "gpu-kernels", "codegen-macros", "shapes"];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    mutant: Vec<Mutant>,
}

/// One change. The head of the list says what each key means.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutant {
    name: String,
    what: String,
    file: String,
    find: String,
    replace: String,
    spec: String,
    #[serde(default = "default_family")]
    family: String,
    #[serde(default)]
    in_ci: bool,
    equivalent: Option<String>,
}

fn default_family() -> String {
    Arch::default().name.into()
}

/// Kernels that are judged: a spec, and a family of GPUs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Judged<'a> {
    spec: &'a str,
    family: &'a str,
}

impl Mutant {
    fn judged(&self) -> Judged<'_> {
        Judged { spec: &self.spec, family: &self.family }
    }
}

/// Which changes are planted.
pub enum Choice<'a> {
    /// Those that every run of the tests plants.
    Ci,
    /// Those of these names, or all if there are none.
    Named(&'a [String]),
}

/// Plants the chosen changes. Fails if one is not seen, or if the unchanged kernels of a spec do
/// not pass.
pub fn plant(choice: Choice) -> Result<(), String> {
    setup::device_compiler()?;
    let start = Instant::now();
    let mutants = read(&root().join("tests/mutants/mutants.toml"))?;
    let chosen: Vec<&Mutant> = match choice {
        Choice::Ci => mutants.iter().filter(|mutant| mutant.in_ci).collect(),
        Choice::Named([]) => mutants.iter().collect(),
        Choice::Named(names) => names
            .iter()
            .map(|name| {
                let found = mutants.iter().find(|mutant| mutant.name == *name);
                found.ok_or_else(|| format!("no mutant `{name}` in tests/mutants/mutants.toml"))
            })
            .collect::<Result<_, _>>()?,
    };
    // The tests have built the command, with features that a build of it alone would not have.
    if !matches!(choice, Choice::Ci) {
        run(cargo().args(["build", "--package", "framestride-cli"]))?;
    }
    let specs: BTreeSet<Judged> = chosen.iter().map(|mutant| mutant.judged()).collect();
    step(&format!("{} mutants, after the unchanged kernels of {} specs", chosen.len(), specs.len()));
    let wrong = in_copies(specs.len() + chosen.len(), |copy, index| {
        let jobs = specs
            .iter()
            .map(|judged| (*judged, None))
            .chain(chosen.iter().map(|mutant| (mutant.judged(), Some(*mutant))));
        let (judged, mutant) = jobs.clone().nth(index).ok_or("no such job")?;
        try_one(copy, judged, mutant)
    })?;
    if wrong.is_empty() {
        step(&format!("every mutant was seen ({:.0} s)", start.elapsed().as_secs_f64()));
        return Ok(());
    }
    Err(format!("{} of {} mutants and specs:\n  {}", wrong.len(), specs.len() + chosen.len(), wrong.join("\n  ")))
}

fn read(path: &Path) -> Result<Vec<Mutant>, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let list: List = toml::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut names = BTreeSet::new();
    match list.mutant.iter().find(|mutant| !names.insert(&mutant.name)) {
        Some(twice) => Err(format!("two mutants have the name `{}`", twice.name)),
        None => Ok(list.mutant),
    }
}

/// Calls `job` with every number below `count` and with a copy of the sources that no other call
/// uses. Collects what it finds wrong.
fn in_copies(
    count: usize,
    job: impl Fn(&Path, usize) -> Result<Option<String>, String> + Sync,
) -> Result<Vec<String>, String> {
    let next = AtomicUsize::new(0);
    let wrong = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let work = |worker: usize| -> Result<(), String> {
            let copy = root().join("target/mutants").join(worker.to_string());
            fs::create_dir_all(&copy).map_err(|error| format!("cannot create {}: {error}", copy.display()))?;
            for source in SOURCES {
                copy_all(&root().join(source), &copy.join(source))?;
            }
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    return Ok(());
                }
                if let Some(found) = job(&copy, index)? {
                    wrong.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(found);
                }
            }
        };
        let workers: Vec<_> = (0..WORKERS).map(|worker| scope.spawn(move || work(worker))).collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a worker panicked".to_string())?)
    })?;
    Ok(wrong.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()))
}

/// Plants a change in the copy, or none, and judges the kernels of a spec. Returns what is wrong.
fn try_one(copy: &Path, judged: Judged, mutant: Option<&Mutant>) -> Result<Option<String>, String> {
    let start = Instant::now();
    let Some(mutant) = mutant else {
        let verdict = judge(copy, judged)?;
        return Ok(match verdict {
            Verdict::Passed => None,
            Verdict::Seen(how) | Verdict::Broken(how) => {
                Some(format!("{} for {}, unchanged: {how}", judged.spec, judged.family))
            }
        });
    };
    let file = copy.join(&mutant.file);
    let original = fs::read_to_string(&file).map_err(|error| format!("cannot read {}: {error}", file.display()))?;
    let times = original.matches(&mutant.find).count();
    if times != 1 {
        return Ok(Some(format!("{}: its text stands {times} times in {}, not once", mutant.name, mutant.file)));
    }
    write(&file, &original.replacen(&mutant.find, &mutant.replace, 1))?;
    let verdict = judge(copy, judged);
    write(&file, &original)?;
    let seconds = start.elapsed().as_secs_f64();
    let (word, wrong) = match (verdict?, &mutant.equivalent) {
        (Verdict::Seen(how), None) => (format!("seen: {how}"), None),
        (Verdict::Passed, Some(why)) => (format!("equivalent: {why}"), None),
        (Verdict::Passed, None) => {
            ("NOT SEEN".to_string(), Some(format!("{}: not seen. {}", mutant.name, mutant.what)))
        }
        (Verdict::Seen(how), Some(_)) => {
            ("NOT EQUIVALENT".to_string(), Some(format!("{} is seen: {how}", mutant.name)))
        }
        (Verdict::Broken(how), _) => ("BROKEN".to_string(), Some(format!("{}: {how}", mutant.name))),
    };
    println!("{seconds:6.1} s  {:<44} {word}", mutant.name);
    Ok(wrong)
}

enum Verdict {
    Passed,
    /// They were found to be wrong. This is the first complaint.
    Seen(String),
    /// Nothing was judged, because the kernels do not build or the command was misused.
    Broken(String),
}

/// Builds a spec's kernels from a copy of the sources, and lets the unchanged command verify them.
fn judge(copy: &Path, Judged { spec, family }: Judged) -> Result<Verdict, String> {
    let spec = root().join("tests/mutants").join(format!("{spec}.toml"));
    let name = Spec::from_file(&spec).map_err(|error| error.to_string())?.name;
    let kernels = copy.join("kernels");
    let ptx = kernels.join(format!("{name}.ptx"));
    let framestride = |arguments: &[&str]| -> Result<Output, String> {
        let mut command = Command::new(root().join("target/debug/framestride"));
        command.arg(arguments[0]).arg(&spec).args(&arguments[1..]).env("FRAMESTRIDE_SOURCE", copy);
        command.output().map_err(|error| format!("framestride does not start: {error}"))
    };
    let built = framestride(&["build", "--family", family, "--out", &kernels.display().to_string()])?;
    if !built.status.success() {
        return Ok(Verdict::Broken(format!("does not build: {}", first_lines(&built.stderr))));
    }
    // Without these kernels, the command would take those of its templates.
    let verify = ["verify", "--device", "emulator", "--seed", SEED, "--fail-fast", "--ptx"];
    let verified = framestride(&[&verify[..], &[&ptx.display().to_string()]].concat())?;
    let complaints: Vec<u8> = if verified.stderr.is_empty() {
        let text = String::from_utf8_lossy(&verified.stdout);
        text.lines().find(|line| line.contains("FAILED")).unwrap_or_default().into()
    } else {
        verified.stderr
    };
    Ok(match verified.status.code() {
        Some(0) => Verdict::Passed,
        Some(1) => Verdict::Seen(first_lines(&complaints)),
        _ => Verdict::Broken(format!("verify ended with {}: {}", verified.status, first_lines(&complaints))),
    })
}

/// The beginning of a text, on one line.
fn first_lines(text: &[u8]) -> String {
    let words: Vec<String> = String::from_utf8_lossy(text).split_whitespace().map(String::from).collect();
    words.join(" ").chars().take(160).collect()
}

/// Copies a file or a folder, and removes what the folder does not have. A file that is already the
/// same keeps its time, by which cargo goes.
fn copy_all(from: &Path, to: &Path) -> Result<(), String> {
    let wrong = |error: std::io::Error| format!("cannot copy {} to {}: {error}", from.display(), to.display());
    if from.is_dir() {
        fs::create_dir_all(to).map_err(wrong)?;
        for entry in fs::read_dir(from).map_err(wrong)? {
            let entry: PathBuf = entry.map_err(wrong)?.path();
            copy_all(&entry, &to.join(entry.file_name().unwrap_or_default()))?;
        }
        for entry in fs::read_dir(to).map_err(wrong)? {
            let entry = entry.map_err(wrong)?.path();
            if !from.join(entry.file_name().unwrap_or_default()).exists() {
                if entry.is_dir() { fs::remove_dir_all(&entry) } else { fs::remove_file(&entry) }.map_err(wrong)?;
            }
        }
        return Ok(());
    }
    let bytes = fs::read(from).map_err(wrong)?;
    if fs::read(to).is_ok_and(|found| found == bytes) { Ok(()) } else { fs::write(to, bytes).map_err(wrong) }
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))
}
