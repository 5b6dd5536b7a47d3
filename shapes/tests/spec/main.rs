//! The spec: what it means, what it refuses and in which words, its schema, its manifest and
//! workspace.

mod bad;
mod builder;
mod good;
mod limits;
mod manifest;
mod schema;
mod shipped;

/// Writes a JSON value as the TOML of a spec.
fn toml(value: &serde_json::Value) -> String {
    fn table(value: &serde_json::Value, path: &str, text: &mut String) {
        let Some(table_of) = value.as_object() else { panic!("{value} is no table") };
        for (name, value) in table_of.iter().filter(|(_, value)| !value.is_object()) {
            // JSON's numbers, strings, booleans and arrays of them are TOML's too.
            text.push_str(&format!("{name} = {value}\n"));
        }
        for (name, value) in table_of.iter().filter(|(_, value)| value.is_object()) {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            text.push_str(&format!("[{path}]\n"));
            table(value, &path, text);
        }
    }
    let mut text = String::new();
    table(value, "", &mut text);
    text
}
