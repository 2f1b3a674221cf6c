//! Results, held against their schemas.

use std::collections::BTreeSet;

use serde_json::Value;

/// Checks a result against a schema, of which it knows the part of JSON Schema that ours use.
pub(crate) fn check(schema: &str, result: &Value) {
    check_value(&serde_json::from_str(schema).unwrap(), result, "result");
}

fn check_value(schema: &Value, value: &Value, path: &str) {
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_u64() => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let fits = |allowed: &str| allowed == kind || (allowed == "number" && kind == "integer");
    match &schema["type"] {
        Value::String(allowed) => assert!(fits(allowed), "{path} is {kind}, not {allowed}"),
        Value::Array(list) => {
            assert!(list.iter().any(|allowed| fits(allowed.as_str().unwrap())), "{path} is {kind}")
        }
        _ => assert!(schema["enum"].as_array().unwrap().contains(value), "{path} is {value}"),
    }
    if let Value::Array(items) = value {
        items
            .iter()
            .enumerate()
            .for_each(|(index, item)| check_value(&schema["items"], item, &format!("{path}[{index}]")));
    }
    let Value::Object(fields) = value else { return };
    let Some(known) = schema["properties"].as_object() else {
        fields.iter().for_each(|(name, field)| {
            check_value(&schema["additionalProperties"], field, &format!("{path}.{name}"))
        });
        return;
    };
    let names: BTreeSet<&String> = fields.keys().collect();
    assert_eq!(names, known.keys().collect(), "{path}");
    assert_eq!(schema["required"].as_array().unwrap().len(), known.len(), "{path}");
    fields.iter().for_each(|(name, field)| check_value(&known[name], field, &format!("{path}.{name}")));
}
