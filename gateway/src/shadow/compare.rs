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
    /// Its body.
    pub body: Body,
}

/// A body, as far as it was kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// All of it.
    Whole(Bytes),
    /// Longer than what is kept.
    TooLong,
    /// There was no memory for it, or it did not come to its end.
    Unknown,
}

/// What a comparison came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// The fields that differ.
    pub found: BTreeMap<String, Difference>,
    /// Whether more may differ than was looked at.
    pub partial: bool,
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
const DECODED: usize = 4 * 1024 * 1024;
/// Arrays of which it is found out whether only their order differs.
const ORDERED: usize = 64;
/// Characters of an example.
const EXAMPLE: usize = 60;

/// The fields in which a service's answer differs from the monolith's.
pub fn compare(rules: &Rules, control: &Answer, candidate: &Answer) -> Compared {
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
    let body = |control: String, candidate: String, mut found: BTreeMap<String, Difference>| {
        found.insert("body".to_owned(), Difference { control, candidate, order: false });
        Compared { found, partial: false }
    };
    let (a, b) = match (&control.body, &candidate.body) {
        (Body::Whole(a), Body::Whole(b)) => (a, b),
        (Body::Whole(a), Body::TooLong) => return body(format!("{} bytes", a.len()), "too long".to_owned(), found),
        (Body::TooLong, Body::Whole(b)) => return body("too long".to_owned(), format!("{} bytes", b.len()), found),
        _ => return Compared { found, partial: true },
    };
    let (Some(a), Some(b)) = (text(control, a), text(candidate, b)) else {
        // Not to be undone here; the same bytes say the same all the same.
        return Compared { partial: a != b, found };
    };
    if a == b {
        return Compared { found, partial: false };
    }
    if let (Some(a), Some(b)) = (json(control, &a), json(candidate, &b)) {
        let work = Cell::new(WORK);
        let mut walk = Walk { rules, path: Vec::new(), found, work: &work, first: false };
        walk.values(Some(&a), Some(&b));
        return Compared { found: walk.found, partial: work.get() == 0 };
    }
    let show = |body: &Bytes| format!("{} bytes: {}", body.len(), mask(&String::from_utf8_lossy(head(body))));
    body(show(&a), show(&b), found)
}

fn head(body: &Bytes) -> &[u8] {
    &body[..body.len().min(EXAMPLE)]
}

/// A body without its codings; nothing where they cannot be undone.
fn text(answer: &Answer, body: &Bytes) -> Option<Bytes> {
    let codings: Vec<&str> =
        answer.headers.get_all(header::CONTENT_ENCODING).iter().filter_map(|value| value.to_str().ok()).collect();
    decode(&codings.join(","), body, DECODED)
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
    /// Steps that are left.
    work: &'r Cell<u32>,
    /// Whether one difference is enough.
    first: bool,
}

impl<'j> Walk<'j, '_> {
    fn is_ignored(&self) -> bool {
        self.rules.ignore.iter().any(|pattern| pattern.matches(&self.path))
    }

    fn report(&mut self, control: String, candidate: String, order: bool) {
        if self.first {
            self.found.insert(String::new(), Difference { control: String::new(), candidate: String::new(), order });
            return;
        }
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
        if self.work.get() == 0 || (self.first && !self.found.is_empty()) || self.is_ignored() {
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
        let whole = |values: &'j [Value]| values.iter().collect::<Vec<_>>();
        if self.rules.unordered.iter().any(|pattern| pattern.matches(&self.path)) {
            let (left, right) = self.unmatched(a, b);
            return self.in_order(&left, &right);
        }
        let before = self.found.len();
        self.in_order(&whole(a), &whole(b));
        // The same in another order is one difference, not many. That is looked at only as long as it is cheap.
        if self.found.len() > before && !self.first && a.len() == b.len() && a.len() <= ORDERED {
            let (left, right) = self.unmatched(a, b);
            if left.is_empty() && right.is_empty() && self.work.get() > 0 {
                let path = write(&self.path);
                self.found.retain(|field, _| !field.starts_with(&format!("{path}/*")));
                self.report(format!("{} elements", a.len()), "the same in another order".to_owned(), true);
            }
        }
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
        let mut walk = Walk { rules: self.rules, path, found: BTreeMap::new(), work: self.work, first: true };
        walk.values(Some(a), Some(b));
        walk.found.is_empty()
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
        Answer { status: 200, headers, body: Body::Whole(serde_json::to_vec(body).unwrap().into()) }
    }

    fn rules(ignore: &[&str], unordered: &[&str], tolerance: f64) -> Rules {
        let read = |list: &[&str]| list.iter().map(|text| Pattern::parse(text).unwrap()).collect();
        Rules { ignore: read(ignore), unordered: read(unordered), tolerance, headers: vec![header::CONTENT_TYPE] }
    }

    fn fields(rules: &Rules, a: &Value, b: &Value) -> Vec<String> {
        compare(rules, &answer(a), &answer(b)).found.into_keys().collect()
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
        let found = compare(&rules(&["/l/*/t"], &[], 0.0), &answer(&a), &answer(&b)).found;
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
        other.body = Body::Whole(Bytes::from_static(b"<p>Secret 42</p>"));
        let found = compare(&rules(&[], &[], 0.0), &answer(&json!({})), &other).found;
        assert_eq!(found.keys().collect::<Vec<_>>(), ["body", "header content-type", "status"]);
        assert_eq!(found["body"].candidate, "16 bytes: <x>xxxxxx 99</x>");
        // Longer than what is kept is not the same as what is not. Of two that are, and of what is not known, nothing is said.
        let compared = |control: Body, candidate: Body| {
            let of = |body| Answer { body, ..answer(&json!({})) };
            let Compared { found, partial } = compare(&rules(&[], &[], 0.0), &of(control), &of(candidate));
            (found.into_keys().collect::<Vec<_>>(), partial)
        };
        let whole = || Body::Whole(Bytes::from_static(b"{}"));
        assert_eq!(compared(whole(), Body::TooLong), (vec!["body".to_owned()], false));
        assert_eq!(compared(Body::TooLong, Body::TooLong), (vec![], true));
        assert_eq!(compared(whole(), Body::Unknown), (vec![], true));
        assert_eq!(compared(whole(), whole()), (vec![], false));
    }

    /// A list that was wrong in every element used up what may be done for one comparison, and was taken for the same.
    #[test]
    fn what_is_too_much_to_compare_is_not_the_same() {
        let list = |wrong: u64| {
            let one =
                |n: u64| json!({"id": n, "a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6, "g": 7, "h": 8, "w": wrong});
            json!({"l": (0..500).map(one).collect::<Vec<_>>()})
        };
        assert_eq!(fields(&rules(&[], &[], 0.0), &list(0), &list(1)), ["/l/*/w"]);
        let unordered = compare(&rules(&[], &["/l"], 0.0), &answer(&list(0)), &answer(&list(1)));
        assert!(unordered.partial || !unordered.found.is_empty(), "{unordered:?}");
    }

    #[test]
    fn examples_show_shapes_and_no_values() {
        let found =
            compare(&rules(&[], &[], 0.0), &answer(&json!({"mail": "ann@example.com"})), &answer(&json!({"mail": 7})))
                .found;
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
