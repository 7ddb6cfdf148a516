//! In which fields two answers differ. Pure.
//!
//! A field is `status`, `header NAME`, a JSON Pointer with `*` for indices, or `body` where it is no JSON. What the examples
//! show is redacted: letters and digits are replaced, so that a difference of shape is seen and no customer is.

use std::{cell::Cell, collections::BTreeMap};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use serde_json::{Number, Value};

use super::{
    decode::decode,
    pointer::{Pattern, Step, write},
};

/// What may differ.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rules {
    /// Fields that may.
    pub ignore: Vec<Pattern>,
    /// Arrays whose order may.
    pub unordered: Vec<Pattern>,
    /// How far apart numbers may be.
    pub tolerance: f64,
    /// The header fields that may not.
    pub headers: Vec<HeaderName>,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its fields.
    pub headers: HeaderMap,
    /// Its body; nothing where it was too long to be kept.
    pub body: Option<Bytes>,
}

/// A field that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// What the monolith said, redacted.
    pub control: String,
    /// What the service said, redacted.
    pub candidate: String,
    /// Whether an array has the same elements in another order.
    pub order: bool,
}

/// Fields of one pair of answers that are told apart.
const FIELDS: usize = 50;
/// Steps of one comparison.
const WORK: u32 = 300_000;
/// What is decoded of a compressed body, at most.
const DECODED: usize = 8 * 1024 * 1024;
/// Arrays whose order is looked at.
const UNORDERED: usize = 500;
/// Characters of an example.
const EXAMPLE: usize = 60;

/// The fields in which a service's answer differs from the monolith's.
pub fn compare(rules: &Rules, control: &Answer, candidate: &Answer) -> BTreeMap<String, Difference> {
    let mut found = BTreeMap::new();
    if control.status != candidate.status {
        let (control, candidate) = (control.status.to_string(), candidate.status.to_string());
        found.insert("status".to_owned(), Difference { control, candidate, order: false });
    }
    for name in &rules.headers {
        let read = |headers: &HeaderMap| {
            let values: Vec<&[u8]> = headers.get_all(name).iter().map(HeaderValue::as_bytes).collect();
            let text = String::from_utf8_lossy(&values.join(&b", "[..])).into_owned();
            // `text/html;charset=UTF-8` is `text/html; charset=utf-8`.
            if *name == header::CONTENT_TYPE { text.to_ascii_lowercase().replace(' ', "") } else { text }
        };
        let (a, b) = (read(&control.headers), read(&candidate.headers));
        if a != b {
            // Content types are nobody's secret.
            let show = |text: &str| if *name == header::CONTENT_TYPE { shorten(text) } else { mask(text) };
            found.insert(format!("header {name}"), Difference { control: show(&a), candidate: show(&b), order: false });
        }
    }
    let (Some(a), Some(b)) = (text(control), text(candidate)) else { return found };
    if a == b {
        return found;
    }
    if let (Some(a), Some(b)) = (json(control, &a), json(candidate, &b)) {
        let mut walk = Walk { rules, path: Vec::new(), found, work: &Cell::new(WORK) };
        walk.values(Some(&a), Some(&b));
        return walk.found;
    }
    let show = |body: &Bytes| format!("{} bytes: {}", body.len(), mask(&String::from_utf8_lossy(head(body))));
    found.insert("body".to_owned(), Difference { control: show(&a), candidate: show(&b), order: false });
    found
}

fn head(body: &Bytes) -> &[u8] {
    &body[..body.len().min(EXAMPLE)]
}

/// The body without its codings; as it is where they cannot be undone.
fn text(answer: &Answer) -> Option<Bytes> {
    let body = answer.body.as_ref()?;
    let codings: Vec<&str> =
        answer.headers.get_all(header::CONTENT_ENCODING).iter().filter_map(|value| value.to_str().ok()).collect();
    Some(decode(&codings.join(","), body, DECODED).unwrap_or_else(|| body.clone()))
}

fn json(answer: &Answer, text: &Bytes) -> Option<Value> {
    let kind = answer.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let says_so = essence.ends_with("/json") || essence.ends_with("+json");
    let looks_so = essence.is_empty() && matches!(text.trim_ascii_start().first(), Some(b'{' | b'['));
    (says_so || looks_so).then(|| serde_json::from_slice(text).ok())?
}

struct Walk<'j, 'r> {
    rules: &'r Rules,
    path: Vec<Step<'j>>,
    found: BTreeMap<String, Difference>,
    work: &'r Cell<u32>,
}

impl<'j> Walk<'j, '_> {
    fn is_ignored(&self) -> bool {
        self.rules.ignore.iter().any(|pattern| pattern.matches(&self.path))
    }

    fn report(&mut self, control: String, candidate: String, order: bool) {
        let field = match write(&self.path) {
            root if root.is_empty() => "body".to_owned(),
            field => field,
        };
        if self.found.len() < FIELDS {
            self.found.entry(field).or_insert(Difference { control, candidate, order });
        }
    }

    fn at(&mut self, step: Step<'j>, control: Option<&'j Value>, candidate: Option<&'j Value>) {
        self.path.push(step);
        self.values(control, candidate);
        self.path.pop();
    }

    fn values(&mut self, control: Option<&'j Value>, candidate: Option<&'j Value>) {
        self.work.set(self.work.get().saturating_sub(1));
        if self.work.get() == 0 || self.is_ignored() {
            return;
        }
        match (control, candidate) {
            (Some(Value::Object(a)), Some(Value::Object(b))) => {
                for (name, value) in a {
                    self.at(Step::Name(name), Some(value), b.get(name));
                }
                for (name, value) in b.iter().filter(|(name, _)| !a.contains_key(*name)) {
                    self.at(Step::Name(name), None, Some(value));
                }
            }
            (Some(Value::Array(a)), Some(Value::Array(b))) => self.arrays(a, b),
            (Some(Value::Number(a)), Some(Value::Number(b))) if is_near(a, b, self.rules.tolerance) => {}
            (a, b) if a == b => {}
            (a, b) => self.report(show(a), show(b), false),
        }
    }

    fn arrays(&mut self, a: &'j [Value], b: &'j [Value]) {
        let unordered = self.rules.unordered.iter().any(|pattern| pattern.matches(&self.path));
        if a.len().max(b.len()) > UNORDERED || (!unordered && a == b) {
            return self.in_order(&a.iter().collect::<Vec<_>>(), &b.iter().collect::<Vec<_>>());
        }
        let (left, right) = self.unmatched(a, b);
        if unordered {
            return self.in_order(&left, &right);
        }
        if left.is_empty() && right.is_empty() && !self.same(a, b) {
            return self.report(format!("{} elements", a.len()), "the same in another order".to_owned(), true);
        }
        self.in_order(&a.iter().collect::<Vec<_>>(), &b.iter().collect::<Vec<_>>());
    }

    fn in_order(&mut self, a: &[&'j Value], b: &[&'j Value]) {
        if a.len() != b.len() {
            self.report(format!("{} elements", a.len()), format!("{} elements", b.len()), false);
        }
        for (n, (a, b)) in a.iter().zip(b).enumerate() {
            self.at(Step::Index(n), Some(a), Some(b));
        }
    }

    /// Whether nothing that matters differs.
    fn is_same(&self, a: &'j Value, b: &'j Value) -> bool {
        let mut path = self.path.clone();
        path.push(Step::Index(0));
        let mut walk = Walk { rules: self.rules, path, found: BTreeMap::new(), work: self.work };
        walk.values(Some(a), Some(b));
        walk.found.is_empty()
    }

    fn same(&self, a: &'j [Value], b: &'j [Value]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| self.is_same(a, b))
    }

    /// The elements of either that the other does not have.
    fn unmatched(&self, a: &'j [Value], b: &'j [Value]) -> (Vec<&'j Value>, Vec<&'j Value>) {
        let mut left = Vec::new();
        let mut right: Vec<&Value> = b.iter().collect();
        for value in a {
            match right.iter().position(|other| self.is_same(value, other)) {
                Some(place) => drop(right.remove(place)),
                None => left.push(value),
            }
        }
        (left, right)
    }
}

fn is_near(a: &Number, b: &Number, tolerance: f64) -> bool {
    if a == b {
        return true;
    }
    // Whole numbers too long for a float are told apart exactly.
    if let (false, Some(a), Some(b)) = (tolerance > 0.0, a.as_i128(), b.as_i128()) {
        return a == b;
    }
    a.as_f64().zip(b.as_f64()).is_some_and(|(a, b)| (a - b).abs() <= tolerance)
}

fn show(value: Option<&Value>) -> String {
    match value {
        None => "absent".to_owned(),
        Some(Value::String(text)) => format!("\"{}\"", mask(text)),
        Some(Value::Number(number)) => mask(&number.to_string()),
        Some(Value::Array(elements)) => format!("[{} elements]", elements.len()),
        Some(Value::Object(members)) => format!("{{{} members}}", members.len()),
        Some(other) => other.to_string(),
    }
}

/// A text without what it says.
fn mask(text: &str) -> String {
    let masked: String = text
        .chars()
        .take(EXAMPLE)
        .map(|char| match char {
            '0'..='9' => '9',
            char if char.is_alphabetic() => 'x',
            char if char.is_control() => ' ',
            char => char,
        })
        .collect();
    if text.chars().nth(EXAMPLE).is_some() { masked + "…" } else { masked }
}

fn shorten(text: &str) -> String {
    text.chars().take(EXAMPLE).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn answer(body: &Value) -> Answer {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Answer { status: 200, headers, body: Some(serde_json::to_vec(body).unwrap().into()) }
    }

    fn rules(ignore: &[&str], unordered: &[&str], tolerance: f64) -> Rules {
        let read = |list: &[&str]| list.iter().map(|text| Pattern::parse(text).unwrap()).collect();
        Rules { ignore: read(ignore), unordered: read(unordered), tolerance, headers: vec![header::CONTENT_TYPE] }
    }

    fn fields(rules: &Rules, a: &Value, b: &Value) -> Vec<String> {
        compare(rules, &answer(a), &answer(b)).into_keys().collect()
    }

    #[test]
    fn fields_are_named_by_pointer() {
        let a = json!({"id": 1, "items": [{"price": 10, "name": "a"}, {"price": 20, "name": "b"}], "x": null});
        let b = json!({"id": 1, "items": [{"price": 11, "name": "a"}, {"price": 21, "name": "b"}], "y": 1});
        assert_eq!(fields(&rules(&[], &[], 0.0), &a, &b), ["/items/*/price", "/x", "/y"]);
        assert_eq!(fields(&rules(&["/items/*/price", "/x", "/y"], &[], 0.0), &a, &b), [""; 0]);
        assert_eq!(fields(&rules(&["/x", "/y"], &[], 1.0), &a, &b), [""; 0]);
        assert_eq!(fields(&rules(&["/**"], &[], 0.0), &a, &b), [""; 0]);
        assert_eq!(fields(&rules(&[], &[], 0.0), &json!(1), &json!([1])), ["body"]);
        assert_eq!(fields(&rules(&[], &[], 0.0), &json!({"a": 1}), &json!({"a": 1.0})), [""; 0]);
        let long = |n: u64| json!({"id": n});
        assert_eq!(fields(&rules(&[], &[], 0.0), &long(9_007_199_254_740_993), &long(9_007_199_254_740_992)), ["/id"]);
    }

    #[test]
    fn order_matters_unless_it_does_not() {
        let (a, b) =
            (json!({"l": [{"k": 1, "t": 1}, {"k": 2, "t": 2}]}), json!({"l": [{"k": 2, "t": 9}, {"k": 1, "t": 8}]}));
        let found = compare(&rules(&["/l/*/t"], &[], 0.0), &answer(&a), &answer(&b));
        assert!(found.len() == 1 && found["/l"].order, "{found:?}");
        assert_eq!(fields(&rules(&["/l/*/t"], &["/l"], 0.0), &a, &b), [""; 0]);
        assert_eq!(fields(&rules(&[], &["/l"], 0.0), &json!({"l": [1, 2, 2]}), &json!({"l": [2, 1, 1]})), ["/l/*"]);
        assert_eq!(fields(&rules(&[], &["/l"], 0.0), &json!({"l": [1, 2]}), &json!({"l": [2, 1, 3]})), ["/l"]);
    }

    #[test]
    fn status_fields_text_and_bytes() {
        let mut other = answer(&json!({}));
        other.status = 404;
        other.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html"));
        other.body = Some(Bytes::from_static(b"<p>Secret 42</p>"));
        let found = compare(&rules(&[], &[], 0.0), &answer(&json!({})), &other);
        assert_eq!(found.keys().collect::<Vec<_>>(), ["body", "header content-type", "status"]);
        assert_eq!(found["body"].candidate, "16 bytes: <x>xxxxxx 99</x>");
        // What was too long is compared by the rest.
        other.body = None;
        other.status = 200;
        let found = compare(&rules(&[], &[], 0.0), &answer(&json!({})), &other);
        assert_eq!(found.keys().collect::<Vec<_>>(), ["header content-type"]);
    }

    #[test]
    fn examples_show_shapes_and_no_values() {
        let found =
            compare(&rules(&[], &[], 0.0), &answer(&json!({"mail": "ann@example.com"})), &answer(&json!({"mail": 7})));
        let Difference { control, candidate, .. } = &found["/mail"];
        assert_eq!((control.as_str(), candidate.as_str()), ("\"xxx@xxxxxxx.xxx\"", "9"));
    }

    fn tree() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[a-c]{0,3}".prop_map(Value::from)
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map("[a-c/~]{1,2}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// Equal answers have no differences; and whatever differs, ignoring what was reported leaves nothing.
        #[test]
        fn what_is_reported_is_all_that_differs(a in tree(), b in tree()) {
            prop_assert_eq!(fields(&rules(&[], &[], 0.0), &a, &a), Vec::<String>::new());
            let found = fields(&rules(&[], &[], 0.0), &a, &b);
            prop_assert_eq!(found.is_empty(), a == b);
            let ignore: Vec<&str> = found.iter().map(|field| if field == "body" { "" } else { field.as_str() }).collect();
            prop_assert_eq!(fields(&rules(&ignore, &[], 0.0), &a, &b), Vec::<String>::new());
        }

        /// An array in any order is the same where its order does not matter.
        #[test]
        fn any_order_will_do(mut list in proptest::collection::vec(tree(), 0..8), seed: u64) {
            let a = json!({"l": list.clone()});
            let n = list.len().max(1) as u64;
            list.rotate_left(usize::try_from(seed % n).unwrap());
            prop_assert_eq!(fields(&rules(&[], &["/l"], 0.0), &a, &json!({"l": list})), Vec::<String>::new());
        }
    }
}
