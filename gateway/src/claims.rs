//! What a verified token says of who asks.
//!
//! Only tokens whose signature was checked become [`Claims`]: whoever holds some need not doubt them.

use std::borrow::Cow;

use http::HeaderValue;
use serde_json::Value;

/// The claims of a verified token.
#[derive(Debug, Default, PartialEq)]
pub struct Claims {
    all: Vec<(Box<str>, Value)>,
}

impl Claims {
    /// Takes over what a token says, each name once.
    pub fn new(all: Vec<(Box<str>, Value)>) -> Self {
        Self { all }
    }

    /// A claim, whatever it is.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.all.iter().find(|(known, _)| **known == *name).map(|(_, value)| value)
    }

    /// A claim that one text can say: a text, a number, `true` or `false`. An empty text says nothing.
    pub fn text(&self, name: &str) -> Option<Cow<'_, str>> {
        text(self.get(name)?)
    }

    /// Whether a claim is this, or a list that has it.
    pub fn says(&self, name: &str, value: &str) -> bool {
        match self.get(name) {
            Some(Value::Array(items)) => items.iter().any(|item| text(item).is_some_and(|text| text == value)),
            Some(one) => text(one).is_some_and(|text| text == value),
            None => false,
        }
    }

    /// A claim as a field's value; lists are joined by commas. Nothing where a field cannot carry it unchanged.
    pub fn field(&self, name: &str) -> Option<HeaderValue> {
        let text = match self.get(name)? {
            Value::Array(items) => {
                let texts: Option<Vec<_>> = items.iter().map(|item| text(item).filter(|t| !t.contains(','))).collect();
                Cow::Owned(texts.filter(|texts| !texts.is_empty())?.join(","))
            }
            value => text(value)?,
        };
        // A reader takes blanks at either end away, and would see another's name.
        let plain = text.trim() == text && !text.chars().any(char::is_control);
        plain.then(|| HeaderValue::from_bytes(text.as_bytes()).ok()).flatten()
    }

    /// Whether the token was given a scope: `scope` (RFC 8693 §4.2), or `scp` as some providers have it.
    pub fn has_scope(&self, scope: &str) -> bool {
        ["scope", "scp"].into_iter().filter_map(|name| self.get(name)).any(|value| match value {
            Value::String(text) => text.split(' ').any(|known| known == scope),
            Value::Array(items) => items.iter().any(|item| item.as_str() == Some(scope)),
            _ => false,
        })
    }

    /// About how much memory they take.
    pub fn size(&self) -> usize {
        fn of(value: &Value) -> usize {
            32 + match value {
                Value::String(text) => text.len(),
                Value::Array(items) => items.iter().map(of).sum(),
                Value::Object(map) => map.iter().map(|(name, value)| 32 + name.len() + of(value)).sum(),
                _ => 0,
            }
        }
        self.all.iter().map(|(name, value)| 16 + name.len() + of(value)).sum()
    }
}

fn text(value: &Value) -> Option<Cow<'_, str>> {
    match value {
        Value::String(text) if text.is_empty() => None,
        Value::String(text) => Some(Cow::Borrowed(text)),
        // A larger one has lost digits already: two of them would be one.
        Value::Number(number) if number.is_i64() || number.is_u64() => Some(Cow::Owned(number.to_string())),
        Value::Bool(is) => Some(Cow::Borrowed(if *is { "true" } else { "false" })),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_carries_a_claim_unchanged_or_not_at_all() {
        let claims = |value: Value| Claims::new(vec![("c".into(), value)]);
        let field = |value: Value| claims(value).field("c").map(|value| value.as_bytes().to_vec());
        assert_eq!(field("alice".into()).as_deref(), Some(&b"alice"[..]));
        assert_eq!(field("zoë".into()).as_deref(), Some("zoë".as_bytes()));
        assert_eq!(field(42.into()).as_deref(), Some(&b"42"[..]));
        assert_eq!(field(true.into()).as_deref(), Some(&b"true"[..]));
        assert_eq!(field(serde_json::json!(["a", "b"])).as_deref(), Some(&b"a,b"[..]));
        for none in [
            Value::Null,
            "".into(),
            " admin".into(),
            "admin\t".into(),
            "a\r\nx-admin: 1".into(),
            "\u{85}a".into(),
            serde_json::json!([]),
            serde_json::json!(["a,root"]),
            serde_json::json!(["a", ["b"]]),
            serde_json::json!({"a": 1}),
        ] {
            assert_eq!(field(none.clone()), None, "{none}");
        }
    }

    #[test]
    fn scopes_are_whole_words() {
        let claims = |name: &str, value: Value| Claims::new(vec![(name.into(), value)]);
        assert!(claims("scope", "orders:read orders:write".into()).has_scope("orders:read"));
        assert!(claims("scp", serde_json::json!(["orders:read"])).has_scope("orders:read"));
        assert!(!claims("scope", "orders:readwrite".into()).has_scope("orders:read"));
        assert!(!claims("scopes", "orders:read".into()).has_scope("orders:read"));
        assert!(!claims("scope", "".into()).has_scope("orders:read"));
    }
}
