//! The JSON schema of the spec, for editors and other tools, made from the key list.

use serde_json::{Map, Value, json};

use super::keys::{Key, Kind, NAME_LENGTH, Presence, TABLES, Table};

/// The JSON schema (draft 2020-12) of a spec: what `shapes/spec.schema.json` holds.
///
/// It says what the parser asks of each key alone. Only the parser knows what concerns several
/// keys, such as a grid that matches the tokens of a frame.
pub fn json_schema() -> Value {
    let mut schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "framestride spec",
    });
    for table in TABLES.iter().filter(|table| table.parent().is_none()) {
        if let (Some(to), Value::Object(from)) = (schema.as_object_mut(), table_schema(table)) {
            to.extend(from);
        }
    }
    schema
}

fn table_schema(table: &Table) -> Value {
    let properties: Map<String, Value> = table
        .keys()
        .map(|key| (key.name().to_owned(), key_schema(key)))
        .chain(table.tables().map(|inner| (inner.name().to_owned(), table_schema(inner))))
        .collect();
    let required: Vec<&str> = table
        .keys()
        .filter(|key| matches!(key.presence, Presence::Required))
        .map(Key::name)
        .chain(table.tables().filter(|inner| inner.required).map(Table::name))
        .collect();
    let mut schema = json!({
        "type": "object",
        "description": table.doc,
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    });
    let one_of: Vec<Value> = table
        .keys()
        .filter(|key| matches!(key.presence, Presence::OneOfTable))
        .map(|key| json!({ "required": [key.name()] }))
        .collect();
    if !one_of.is_empty() {
        schema["oneOf"] = one_of.into();
    }
    schema
}

fn key_schema(key: &Key) -> Value {
    let mut schema = match key.kind {
        Kind::Name => json!({ "type": "string", "pattern": format!("^[a-z0-9_]{{1,{NAME_LENGTH}}}$") }),
        Kind::Integer(least, most) => json!({ "type": "integer", "minimum": least, "maximum": most }),
        Kind::IntegerOf(values) => json!({ "enum": values }),
        Kind::Number(0.0, most) => json!({ "type": "number", "exclusiveMinimum": 0, "maximum": most }),
        Kind::Number(least, most) => json!({ "type": "number", "minimum": least, "maximum": most }),
        Kind::Choice(names) => json!({ "enum": names }),
        Kind::Boolean => json!({ "type": "boolean" }),
        Kind::Pair(least, most) => json!({
            "type": "array",
            "items": { "type": "integer", "minimum": least, "maximum": most },
            "minItems": 2,
            "maxItems": 2,
        }),
    };
    schema["description"] = key.doc.into();
    if let Presence::Default(text) = key.presence
        && let Ok(default) = serde_json::from_str::<Value>(text)
    {
        // Defaults are TOML literals of a kind that JSON writes in the same way.
        schema["default"] = default;
    }
    schema
}
