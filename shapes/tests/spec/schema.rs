//! The JSON schema and the parser agree on every key.

use framestride_shapes::models;
use framestride_shapes::spec::{Spec, json_schema};
use serde_json::{Value, json};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/spec.schema.json");

/// The file in the repository is what the code makes. `UPDATE_SCHEMA=1 cargo test -p
/// framestride-shapes` writes it.
#[test]
fn file_is_up_to_date() {
    let schema = json_schema();
    if std::env::var_os("UPDATE_SCHEMA").is_some() {
        std::fs::write(FILE, format!("{schema:#}\n")).expect("shapes/spec.schema.json can be written");
    }
    let text = std::fs::read_to_string(FILE).expect("shapes/spec.schema.json");
    let file: Value = serde_json::from_str(&text).expect("shapes/spec.schema.json is JSON");
    assert_eq!(file, schema, "UPDATE_SCHEMA=1 cargo test -p framestride-shapes writes shapes/spec.schema.json anew");
}

/// Whether a value has the form that a schema asks for. Knows the words that the spec's schema
/// uses, and fails on others.
fn valid(schema: &Value, value: &Value) -> bool {
    let words = schema.as_object().expect("a schema");
    words.iter().all(|(word, argument)| match word.as_str() {
        "$schema" | "title" | "description" | "default" => true,
        "type" => match argument.as_str() {
            Some("object") => value.is_object(),
            Some("array") => value.is_array(),
            Some("string") => value.is_string(),
            Some("boolean") => value.is_boolean(),
            // A float is no integer for TOML, whatever JSON schema says of 5.0.
            Some("integer") => value.is_i64() || value.is_u64(),
            Some("number") => value.is_number(),
            other => panic!("type {other:?}"),
        },
        "enum" => argument.as_array().expect("values").contains(value),
        "pattern" => {
            assert_eq!(argument, "^[a-z0-9_]{1,64}$");
            let known = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            value.as_str().is_none_or(|text| (1..=64).contains(&text.len()) && text.chars().all(known))
        }
        "minimum" => value.as_f64().is_none_or(|value| value >= argument.as_f64().expect("a number")),
        "exclusiveMinimum" => value.as_f64().is_none_or(|value| value > argument.as_f64().expect("a number")),
        "maximum" => value.as_f64().is_none_or(|value| value <= argument.as_f64().expect("a number")),
        "items" => value.as_array().is_none_or(|items| items.iter().all(|item| valid(argument, item))),
        "minItems" => value.as_array().is_none_or(|items| items.len() as u64 >= argument.as_u64().expect("a count")),
        "maxItems" => value.as_array().is_none_or(|items| items.len() as u64 <= argument.as_u64().expect("a count")),
        "properties" => value.as_object().is_none_or(|table| {
            table.iter().all(|(name, value)| argument.get(name).is_none_or(|schema| valid(schema, value)))
        }),
        "required" => value.as_object().is_none_or(|table| {
            argument.as_array().expect("names").iter().all(|name| table.contains_key(name.as_str().expect("a name")))
        }),
        "additionalProperties" => {
            assert_eq!(argument, false);
            value.as_object().is_none_or(|table| table.keys().all(|name| schema["properties"].get(name).is_some()))
        }
        "oneOf" => argument.as_array().expect("schemas").iter().filter(|schema| valid(schema, value)).count() == 1,
        other => panic!("the schema says {other:?}, which this test does not know"),
    })
}

/// A spec with every key that can stand beside the others. Nothing in it has its default value.
fn full() -> Value {
    json!({
        "name": "full",
        "video": { "frames": 6, "tokens_per_frame": 30, "grid": [5, 6] },
        "before": { "tokens": 9 },
        "after": { "tokens": 4 },
        "attention": { "heads": 3, "head_dim": 128, "dtype": "f16", "batch": 2, "compute": "e4m3" },
        "qk_norm": { "kind": "rms", "over": "heads", "eps": 1e-5 },
        "rope": { "pairs": "interleaved", "channels": 48, "before": true, "after": true, "per_head": true },
        "masks": { "spatial": { "density": 0.7 }, "temporal": { "half_width": 40 } },
        "sink": { "frames": 1 },
        "profile": { "rows": 32, "seed": 5 },
        "precision": { "largest_error": 0.25 },
        "schedule": { "steps": 9, "layers": 8, "dense_steps": 2, "dense_layers": 3 },
    })
}

/// [`full`], or for the keys of [text] a spec with it in place of the text on both sides. For the keys that
/// [precision] needs, it is a spec without that.
fn full_for(path: &str) -> Value {
    let mut document = full();
    if ["/attention/compute", "/attention/head_dim"].contains(&path) {
        remove(&mut document, "/precision");
    }
    if path.starts_with("/text/") || path == "/rope/text" {
        for both in ["/before", "/after", "/rope/before", "/rope/after"] {
            remove(&mut document, both);
        }
        document["text"] = json!({ "tokens": 9, "position": "first" });
        document["rope"]["text"] = true.into();
    }
    document
}

/// Paths of all keys in a schema.
fn leaves(schema: &Value, path: &str, found: &mut Vec<String>) {
    for (name, inner) in schema["properties"].as_object().expect("properties") {
        let path = format!("{path}/{name}");
        match inner.get("properties") {
            Some(_) => leaves(inner, &path, found),
            None => found.push(path),
        }
    }
}

fn all_leaves() -> Vec<String> {
    let mut paths = Vec::new();
    leaves(&json_schema(), "", &mut paths);
    paths
}

fn parse(value: &Value) -> Result<Spec, framestride_shapes::spec::SpecError> {
    Spec::parse("schema.toml", &crate::toml(value))
}

/// The table that holds a path, with the path's last name.
fn table<'a>(value: &'a mut Value, path: &str) -> (&'a mut serde_json::Map<String, Value>, String) {
    let (parent, name) = path.rsplit_once('/').expect("a path");
    let table = value.pointer_mut(parent).and_then(Value::as_object_mut).expect("a table");
    (table, name.to_owned())
}

/// A document with the key written. The widths of a mask exclude each other, the grid fixes the
/// tokens of a frame, and 8 bits have one head dim.
fn with(path: &str, to: Value) -> Value {
    let mut document = full_for(path);
    let (table, name) = table(&mut document, path);
    if path.starts_with("/masks/") {
        table.clear();
    }
    if name == "tokens_per_frame" {
        table.remove("grid");
    }
    if name == "head_dim" {
        table.remove("compute");
    }
    table.insert(name, to);
    document
}

/// Every key of the schema is one that the parser reads: another value of it gives another spec.
#[test]
fn every_key_of_the_schema_is_read() {
    for path in all_leaves() {
        let full_spec = parse(&full_for(&path)).unwrap_or_else(|error| panic!("{error}"));
        assert!(valid(&json_schema(), &full_for(&path)));
        let schema = all_leaves_schema(&path);
        // Of all values that the schema allows by a bound, a choice or a default, one gives another
        // spec.
        let mut values: Vec<Value> =
            ["minimum", "maximum", "default"].iter().filter_map(|word| schema.get(*word)).cloned().collect();
        values.extend(schema.get("enum").and_then(Value::as_array).into_iter().flatten().cloned());
        values.extend([json!(0.9), json!(1), json!(2), json!(50), json!("other"), json!(false), json!([6, 5])]);
        let another = values
            .iter()
            .filter(|value| valid(&schema, value))
            .any(|value| parse(&with(&path, value.clone())).is_ok_and(|spec| spec != full_spec));
        assert!(another, "{path} is in the schema, and no value of it makes a difference");
    }
}

fn all_leaves_schema(path: &str) -> Value {
    let pointer = path.replace('/', "/properties/");
    json_schema().pointer(&pointer).expect("a key of the schema").clone()
}

/// Nothing that the parser accepts is refused by the schema: neither key, nor value, nor absence.
#[test]
fn what_is_accepted_is_in_the_schema() {
    let schema = json_schema();
    for (name, text) in models() {
        // Shipped specs together use every key but those of other widths.
        let value = from_toml(text);
        assert!(valid(&schema, &value), "{name} is a spec, and the schema refuses it");
    }
    let values = [
        json!(-1),
        json!(0),
        json!(1),
        json!(3),
        json!(64),
        json!(1024),
        json!(1025),
        json!(1u64 << 25),
        json!(u32::MAX),
        json!(1u64 << 40),
        json!(0.0),
        json!(0.5),
        json!(1.0),
        json!(1.5),
        json!(1e-30),
        json!(1e-300),
        json!(1e9),
        json!(true),
        json!(""),
        json!("last"),
        json!("f16"),
        json!("Name"),
        json!("rms"),
        json!("heads"),
        json!([]),
        json!([5, 6]),
        json!([30, 1]),
        json!([5, 6, 1]),
        json!(["5", "6"]),
    ];
    let mut refused = 0;
    for path in all_leaves() {
        for value in &values {
            let document = with(&path, value.clone());
            match parse(&document) {
                Ok(_) => assert!(valid(&schema, &document), "{path} = {value} is accepted, and the schema refuses it"),
                // What the parser refuses for this key's own type or range, the schema refuses too.
                // The parser's message is the one for every value of a wrong type.
                Err(error) => {
                    let allowed = |value| match parse(&with(&path, value)) {
                        Err(error) => error.problems.first().map(|problem| problem.allowed.clone()),
                        Ok(_) => None,
                    };
                    let wrong_type = allowed(json!({ "inline": 1 }).to_string().into());
                    let own = error.problems.iter().any(|problem| Some(&problem.allowed) == wrong_type.as_ref());
                    assert_eq!(own, !valid(&schema, &document), "{path} = {value}:\n{error}");
                    refused += usize::from(own);
                }
            }
        }
        let mut document = full_for(&path);
        remove(&mut document, &path);
        assert_eq!(parse(&document).is_ok(), valid(&schema, &document), "without {path}");
        let mut document = full_for(&path);
        table_of(&mut document, &path).insert("another".into(), json!(1));
        assert!(parse(&document).is_err() && !valid(&schema, &document), "an unknown key beside {path}");
    }
    assert!(refused > 500, "{refused} refusals compared");
}

/// Takes a key or a table out of a document.
pub fn remove(value: &mut Value, path: &str) {
    let (table, name) = table(value, path);
    table.remove(&name);
}

fn table_of<'a>(value: &'a mut Value, path: &str) -> &'a mut serde_json::Map<String, Value> {
    table(value, path).0
}

/// The documented default of a key is what the parser takes without it.
#[test]
fn defaults_of_the_schema_are_the_parsers() {
    let mut compared = 0;
    for path in all_leaves() {
        let Some(default) = all_leaves_schema(&path).get("default").cloned() else { continue };
        let mut without = full_for(&path);
        remove(&mut without, &path);
        let (with, without) = (parse(&with(&path, default)), parse(&without));
        assert_eq!(with, without, "{path}");
        assert!(with.is_ok(), "{path}");
        compared += 1;
    }
    assert!(compared >= 10, "{compared} defaults");
}

/// Reads the plain TOML of the shipped specs: `[table]` and `key = value` lines whose values are
/// JSON too.
pub fn from_toml(text: &str) -> Value {
    let (mut root, mut path) = (json!({}), String::new());
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(table) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            path = format!("/{}", table.replace('.', "/"));
            let mut at = &mut root;
            for name in table.split('.') {
                at = at.as_object_mut().expect("a table").entry(name).or_insert(json!({}));
            }
            continue;
        }
        let (name, value) = line.split_once(" = ").expect("key = value");
        let table = root.pointer_mut(&path).and_then(Value::as_object_mut).expect("a table");
        table.insert(name.into(), serde_json::from_str(value).expect("a value that is JSON too"));
    }
    root
}
