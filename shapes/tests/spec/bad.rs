//! Specs that are wrong, each with its whole message: `snapshots/spec__bad__*.snap` is the list to
//! review.

use std::fmt::Write;
use std::path::Path;

use framestride_shapes::spec::{Spec, SpecError};
use framestride_shapes::text::MESSAGE_BYTES;

const GOOD: &str = r#"name = "good"

[video]
frames = 5
tokens_per_frame = 12
grid = [3, 4]

[text]
tokens = 6
position = "last"

[attention]
heads = 2
head_dim = 64
dtype = "bf16"
batch = 1

[qk_norm]
kind = "rms"
over = "head"
eps = 1e-6

[rope]
pairs = "interleaved"
text = false
per_head = false

[masks.spatial]
density = 0.4

[masks.temporal]
half_width = 20

[sink]
frames = 1

[profile]
rows = 16
seed = 0

[schedule]
steps = 50
layers = 60
dense_steps = 5
dense_layers = 2
"#;

#[test]
fn base_is_good() {
    if let Err(error) = Spec::parse("good.toml", GOOD) {
        panic!("{error}");
    }
}

fn refusal(name: &str, text: &str) -> SpecError {
    match Spec::parse("bad.toml", text) {
        Ok(spec) => panic!("{name}: accepted as {spec:?}"),
        Err(error) => error,
    }
}

/// Each case replaces parts of [`GOOD`].
const CASES: &[(&str, &[(&str, &str)])] = &[
    ("name in capitals", &[("\"good\"", "\"Good-1\"")]),
    ("empty name", &[("\"good\"", "\"\"")]),
    ("name too long", &[("\"good\"", "\"a123456789b123456789c123456789d123456789e123456789f123456789g1234\"")]),
    ("name missing", &[("name = \"good\"\n", "")]),
    ("unknown key", &[("frames = 5", "frames = 5\nframe_rate = 24")]),
    ("unknown key, nearly right", &[("tokens_per_frame = 12", "token_per_frame = 12")]),
    ("required table, nearly right", &[("[video]", "[vidoe]")]),
    ("required width, nearly right", &[("density = 0.4", "desnity = 0.4")]),
    ("unknown key at the top", &[("name = \"good\"", "name = \"good\"\nversion = 1")]),
    ("unknown table", &[("[qk_norm]", "[qknorm]")]),
    ("unknown table below a table", &[("[sink]", "[masks.sink]\n[sink]")]),
    ("required table missing", &[("[video]\nframes = 5\ntokens_per_frame = 12\ngrid = [3, 4]\n", "")]),
    ("mask missing", &[("[masks.temporal]\nhalf_width = 20\n", "")]),
    ("required key missing", &[("head_dim = 64\n", "")]),
    (
        "table as a value",
        &[
            ("name = \"good\"", "name = \"good\"\nvideo = 3"),
            ("[video]\nframes = 5\ntokens_per_frame = 12\ngrid = [3, 4]\n", ""),
        ],
    ),
    ("array of tables", &[("[text]", "[[text]]")]),
    ("key twice", &[("frames = 5", "frames = 5\nframes = 6")]),
    ("table twice", &[("[sink]", "[video]\n[sink]")]),
    ("not TOML: no value", &[("frames = 5", "frames =")]),
    ("not TOML: text without quotes", &[("\"last\"", "last")]),
    ("not TOML: unclosed table", &[("[video]", "[video")]),
    ("string for an integer", &[("frames = 5", "frames = \"5\"")]),
    ("float for an integer", &[("frames = 5", "frames = 5.0")]),
    ("zero frames", &[("frames = 5", "frames = 0")]),
    ("negative frames", &[("frames = 5", "frames = -5")]),
    ("frames beyond 64 bits", &[("frames = 5", "frames = 99999999999999999999999")]),
    ("zero tokens per frame", &[("tokens_per_frame = 12", "tokens_per_frame = 0")]),
    ("sequence too long", &[("frames = 5", "frames = 33554431"), ("grid = [3, 4]\n", "")]),
    ("text makes the sequence too long", &[("tokens = 6", "tokens = 33554200")]),
    ("sequence too long for head_dim 128", &[("frames = 5", "frames = 1400000"), ("head_dim = 64", "head_dim = 128")]),
    ("grid of one extent", &[("[3, 4]", "[12]")]),
    ("grid of three extents", &[("[3, 4]", "[3, 2, 2]")]),
    ("grid with a zero", &[("[3, 4]", "[0, 4]")]),
    ("grid that does not match", &[("[3, 4]", "[4, 5]")]),
    ("zero text tokens", &[("tokens = 6", "tokens = 0")]),
    ("text position", &[("\"last\"", "\"middle\"")]),
    ("zero heads", &[("heads = 2", "heads = 0")]),
    ("too many heads over the batch", &[("heads = 2", "heads = 40000"), ("batch = 1", "batch = 2")]),
    (
        "too many rows",
        &[
            ("heads = 2", "heads = 60000"),
            ("tokens_per_frame = 12", "tokens_per_frame = 24000"),
            ("grid = [3, 4]\n", ""),
        ],
    ),
    ("head dim", &[("head_dim = 64", "head_dim = 96")]),
    ("dtype", &[("\"bf16\"", "\"fp8\"")]),
    ("zero batch", &[("batch = 1", "batch = 0")]),
    ("norm kind", &[("\"rms\"", "\"group\"")]),
    ("norm extent", &[("\"head\"", "\"token\"")]),
    ("zero eps", &[("eps = 1e-6", "eps = 0")]),
    ("negative eps", &[("eps = 1e-6", "eps = -1e-6")]),
    ("infinite eps", &[("eps = 1e-6", "eps = inf")]),
    ("eps that f32 loses", &[("eps = 1e-6", "eps = 1e-60")]),
    ("rope pairs", &[("\"interleaved\"", "\"neox\"")]),
    ("rope channels that are no whole chunks", &[("text = false", "channels = 20")]),
    (
        "rope channels whose halves are no whole chunks",
        &[("\"interleaved\"", "\"half\""), ("text = false", "channels = 40")],
    ),
    ("more rope channels than a head has", &[("text = false", "channels = 96")]),
    ("more rope channels than any head has", &[("text = false", "channels = 136")]),
    ("rope flag", &[("per_head = false", "per_head = 0")]),
    (
        "rope of text that is not there",
        &[("text = false", "text = true"), ("[text]\ntokens = 6\nposition = \"last\"\n", "")],
    ),
    ("zero tokens before the video", &[("[attention]", "[before]\ntokens = 0\n[attention]")]),
    ("tokens after the video are not said", &[("\"last\"", "\"first\"\n[after]")]),
    ("text last and after", &[("[attention]", "[after]\ntokens = 7\n[attention]")]),
    ("text first and before", &[("\"last\"", "\"first\"\n[before]\ntokens = 7")]),
    (
        "both sides too long",
        &[("tokens = 6", "tokens = 5"), ("[attention]", "[before]\ntokens = 33554200\n[attention]")],
    ),
    ("rope before the video, where no text is", &[("text = false", "before = true")]),
    ("rope of [after], which is [text]", &[("text = false", "after = true")]),
    (
        "rope tables too large",
        &[
            ("per_head = false", "per_head = true"),
            ("heads = 2", "heads = 4000"),
            ("tokens_per_frame = 12", "tokens_per_frame = 10000"),
            ("grid = [3, 4]\n", ""),
        ],
    ),
    ("zero density", &[("density = 0.4", "density = 0.0")]),
    ("density above one", &[("density = 0.4", "density = 1.5")]),
    ("density of no number", &[("density = 0.4", "density = nan")]),
    ("density below text and sinks", &[("density = 0.4", "density = 0.3")]),
    ("half width of zero", &[("half_width = 20", "half_width = 0")]),
    ("half width over the layout", &[("half_width = 20", "half_width = 61")]),
    ("half width in frames of zero", &[("half_width = 20", "half_width_frames = 0.0")]),
    ("half width in frames under half a token", &[("half_width = 20", "half_width_frames = 0.04")]),
    ("half width in frames over the layout", &[("half_width = 20", "half_width_frames = 5.1")]),
    ("two ways of giving one width", &[("density = 0.4", "density = 0.4\nhalf_width_frames = 2")]),
    ("three ways of giving one width", &[("density = 0.4", "half_width_frames = 2\nhalf_width = 7\ndensity = 0.4")]),
    ("no width", &[("density = 0.4\n", "")]),
    ("all frames are sinks", &[("[sink]\nframes = 1", "[sink]\nframes = 5")]),
    ("negative sink frames", &[("[sink]\nframes = 1", "[sink]\nframes = -1")]),
    ("no profiled rows", &[("rows = 16", "rows = 0")]),
    ("too many profiled rows", &[("rows = 16", "rows = 1025")]),
    ("more profiled rows than tokens", &[("rows = 16", "rows = 61")]),
    ("negative seed", &[("seed = 0", "seed = -1")]),
    ("more dense steps than steps", &[("dense_steps = 5", "dense_steps = 51")]),
    ("more dense layers than layers", &[("dense_layers = 2", "dense_layers = 61")]),
    ("zero steps", &[("steps = 50\n", "steps = 0\n")]),
    ("a bound of precisions without 8 bits", &[("[schedule]", "[precision]\nlargest_error = 0.04\n[schedule]")]),
    ("precision without a bound", &[("[schedule]", "[precision]\n[schedule]")]),
    ("a bound of precisions of zero", &[("[schedule]", "[precision]\nlargest_error = 0\n[schedule]")]),
    ("schedule without layers", &[("layers = 60\n", "")]),
    (
        "many at once",
        &[
            ("frames = 5", "frames = 0"),
            ("head_dim = 64", "head_dim = 100"),
            ("[rope]", "[ropes]"),
            ("density = 0.4", "density = 2"),
            ("rows = 16", "rows = \"16\""),
            ("dense_steps = 5", "dense_steps = 500"),
        ],
    ),
    (
        "every check that needs the whole layout",
        &[
            ("density = 0.4", "density = 0.3"),
            ("half_width = 20", "half_width = 100"),
            ("rows = 16", "rows = 100"),
            ("[3, 4]", "[3, 5]"),
        ],
    ),
    ("characters of several bytes and tabs", &[("name = \"good\"", "\tname\t= \"größe\"\t# für\t\"ß\"")]),
];

#[test]
fn bad_specs() {
    let mut report = format!("Each case changes this spec:\n\n{GOOD}");
    for (name, edits) in CASES {
        let mut text = GOOD.to_owned();
        for (from, to) in *edits {
            assert!(text.contains(from), "{name}: nothing to replace");
            text = text.replacen(from, to, 1);
        }
        let _ = write!(report, "\n## {name}\n\n{}", refusal(name, &text));
    }
    for (name, text) in [
        ("empty file", ""),
        ("one line without an end", "frames = 5"),
        ("windows line ends", "name = 3\r\n[video]\r\nframes = 0\r\n"),
    ] {
        let _ = write!(report, "\n## {name}\n\n{}", refusal(name, text));
    }
    insta::assert_snapshot!(report);
}

/// Files that cannot be read.
#[test]
fn bad_files() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bad_files");
    std::fs::create_dir_all(&folder).expect("a folder for the test");
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        std::fs::write(&path, bytes).expect("a file for the test");
        path
    };
    let latin1 = write("latin1.toml", b"# gr\xf6\xdfe\nname = \"x\"\n");

    let mut report = String::new();
    let mut add = |name: &str, error: SpecError| {
        let message = error.to_string().replace(&format!("{}/", folder.display()), "");
        let _ = write!(report, "## {name}\n\n{message}\n");
    };
    let refused = |result: Result<Spec, SpecError>| result.expect_err("a refusal");
    add("missing file", refused(Spec::from_file(folder.join("none.toml"))));
    add("not UTF-8", refused(Spec::from_file(&latin1)));
    insta::assert_snapshot!(report);
}

/// Every problem carries its parts, for programs.
#[test]
fn problems_have_parts() {
    let error = refusal("parts", &GOOD.replacen("frames = 5", "frames = 0", 1).replacen("heads = 2", "heads = 0", 1));
    let places: Vec<_> =
        error.problems.iter().map(|p| (p.file.as_str(), p.line, p.column, p.key.as_str(), p.found.as_str())).collect();
    assert_eq!(places, [("bad.toml", 4, 10, "video.frames", "is 0"), ("bad.toml", 13, 9, "attention.heads", "is 0")]);
    assert!(error.problems.iter().all(|problem| !problem.allowed.is_empty() && !problem.mend.is_empty()));
}

/// Whatever a file holds, its message fits a screen and a terminal obeys nothing of it.
#[test]
fn messages_stay_small_and_plain() {
    let megabytes = "a".repeat(4 << 20);
    let escapes = "\u{1b}[31m\u{7}\u{9b}2J";
    for (file, text) in [
        ("one.toml", format!("name = \"{megabytes}\"\n[video]\nframes = 0\n")),
        ("one.toml", format!("{megabytes} = 1\n")),
        ("one.toml", format!("[{megabytes}]\n")),
        ("one.toml", format!("x = \"{escapes}\"\n")),
        ("one.toml", format!("\"{escapes}\" = '{escapes}'\n")),
        ("one.toml", (0..10_000).map(|i| format!("key{i} = {i}\n")).collect()),
        (&megabytes, "name = 1".into()),
        (escapes, "name = 1".into()),
    ] {
        let error = Spec::parse(file, &text).unwrap_err().to_string();
        assert!(error.len() <= MESSAGE_BYTES && error.contains("mend: "), "{} bytes: {error:.400}", error.len());
        assert!(error.chars().all(|c| c == '\n' || !c.is_control()), "{error:?}");
    }
    if Path::new("/dev/zero").exists() {
        let endless = Spec::from_file("/dev/zero").unwrap_err().to_string();
        assert!(endless.contains("more than 1048576 bytes"), "{endless}");
    }
}
