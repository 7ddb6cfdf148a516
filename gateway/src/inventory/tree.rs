//! Endpoints as templates, learned from paths: a tree of segments that stays small whatever clients send.
//!
//! A segment is one of many where it looks so (`segment`), where a route's pattern or an OpenAPI document says so, or where too many
//! others stand beside it that hardly anybody asks for. Then those are joined as `{slug}`, and what is asked for often
//! keeps its name, or gets it back: a flood of invented paths does not hide the endpoints that are real.
//!
//! Invariants: at most [`NODES`] nodes and [`ROWS`] rows; only an answer that says that there is something makes an endpoint.

use hashbrown::HashMap;
use http::Method;

use super::{
    counts::{Counts, Seconds, Seen},
    segment::{KINDS, Kind, kind},
};
use crate::{
    routing::path::{decode, literal_segment},
    telemetry::metrics::Arm,
};

/// Segments of all templates together.
pub const NODES: usize = 16_384;
/// Endpoints: templates by method and route.
pub const ROWS: usize = 16_384;
/// Segments of one template; what is longer is cut.
const DEPTH: usize = 16;
/// Segments of patterns and documents, which stay whatever happens, and rows of documents.
const PINNED: usize = NODES / 2;
const DOCUMENTED: usize = ROWS / 2;
/// Requests after which a name among too many keeps it.
const PROVEN: u32 = 16;
/// Requests after which one of many gets a name of its own, if it is that large a part of them.
const PROMOTED: u32 = 64;
/// Segments that are watched for that: of one place, and of all.
const WATCHED: usize = 256;
const WATCHED_ALL: usize = 16_384;
/// How many times its limit a place may have that are asked for.
const STRETCH: u16 = 8;
/// Requests between two times that room is made.
const SQUEEZES: u64 = 4096;
/// Rows of one template.
const ROWS_HERE: usize = 64;

/// The methods that are told apart.
pub const METHODS: [&str; 8] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "OTHER"];

/// Its number among those that are told apart.
pub fn method_number(method: &Method) -> u8 {
    let found = METHODS.iter().position(|known| *known == method.as_str());
    u8::try_from(found.unwrap_or(METHODS.len() - 1)).unwrap_or(0)
}

/// Whether a method writes (RFC 9110 §9.2.1).
pub fn writes(method: u8) -> bool {
    matches!(method, 2..=5 | 7)
}

/// What is known of a method and a route at one template.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// The method's number.
    pub method: u8,
    /// The number of the route's name.
    pub route: u32,
    /// When it was first seen.
    pub first: Seconds,
    /// Whether a document says that it is there.
    pub documented: bool,
    /// Counts of the monolith, the service and the gateway itself.
    pub arms: [Option<Box<Counts>>; 3],
}

impl Row {
    fn take(&mut self, arm: Arm, seen: Seen) {
        if self.first == 0 {
            self.first = seen.at;
        }
        self.arms[arm as usize].get_or_insert_default().take(seen);
    }

    /// Adds what is known of it elsewhere.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.arms.iter_mut().zip(&other.arms) {
            if let Some(theirs) = theirs {
                mine.get_or_insert_default().merge(theirs);
            }
        }
        // Where one of them does not know, the other does.
        self.first =
            if self.first == 0 || other.first == 0 { self.first.max(other.first) } else { self.first.min(other.first) };
        self.documented |= other.documented;
    }

    /// Requests of all arms.
    pub fn requests(&self) -> u64 {
        self.arms.iter().flatten().fold(0, |sum, counts| sum.saturating_add(counts.requests))
    }

    /// Believes no moment after this one.
    pub fn clamp(&mut self, now: Seconds) {
        self.first = self.first.min(now);
        self.arms.iter_mut().flatten().for_each(|counts| counts.clamp(now));
    }
}

/// What the open segment of a place is called.
#[derive(Clone, Debug, Default, PartialEq)]
enum Label {
    #[default]
    Slug,
    Id,
    /// By a pattern or a document.
    Named(Box<str>),
}

#[derive(Debug, Default)]
struct Node {
    literals: HashMap<Box<str>, Node>,
    param: Option<Box<Node>>,
    label: Label,
    /// What the open segment of this node stands for is said by somebody: names that nobody has said are its values.
    open: bool,
    /// Whether it must stay.
    pinned: bool,
    hits: u32,
    /// Literals by kind, without those that must stay.
    kinds: [u16; KINDS],
    /// Where there are too many of one kind.
    wide: Option<Box<Wide>>,
    rows: Vec<Row>,
}

/// A place with too many names.
#[derive(Debug, Default)]
struct Wide {
    /// New names of these kinds are values.
    joined: [bool; KINDS],
    /// So are all that were names.
    values: [bool; KINDS],
    /// How often values came, at least (Misra and Gries 1982): what is a 257th part of them is among these.
    watched: HashMap<u64, u32>,
}

impl Wide {
    /// Counts a value; whether it is asked for so often that it should have a name.
    fn watch(&mut self, segment: &str, watched: &mut usize) -> bool {
        let key = twox_hash::XxHash3_64::oneshot(segment.as_bytes());
        if let Some(count) = self.watched.get_mut(&key) {
            *count += 1;
            if *count < PROMOTED {
                return false;
            }
            self.watched.remove(&key);
            *watched -= 1;
            return true;
        }
        if self.watched.len() < WATCHED && *watched < WATCHED_ALL {
            self.watched.insert(key, 1);
            *watched += 1;
        } else {
            let before = self.watched.len();
            self.watched.retain(|_, count| {
                *count -= 1;
                *count > 0
            });
            *watched -= before - self.watched.len();
        }
        false
    }
}

/// A segment of a template, as it is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// This very segment.
    Literal(String),
    /// One of many.
    Open(String),
}

/// How much there is, of what is bounded.
#[derive(Clone, Copy, Debug)]
struct Sums {
    nodes: usize,
    rows: usize,
    /// Values that are watched, of all places.
    watched: usize,
}

/// All endpoints.
#[derive(Debug)]
pub struct Tree {
    root: Node,
    sums: Sums,
    pinned: usize,
    /// Rows of documents.
    documented: usize,
    /// Requests that a name among many needs to keep it; more after each time that there was no room.
    proven: u32,
    /// Requests so far, and at how many of them room may be made again: it takes a look at everything.
    taken: u64,
    squeezed: u64,
    /// Requests that no endpoint was made for: nothing is there.
    pub unmatched: u64,
    /// Requests for which there was no room.
    pub beyond: u64,
}

impl Default for Tree {
    fn default() -> Self {
        Self {
            root: Node::default(),
            sums: Sums { nodes: 1, rows: 0, watched: 0 },
            pinned: 0,
            documented: 0,
            proven: PROVEN,
            taken: 0,
            squeezed: 0,
            unmatched: 0,
            beyond: 0,
        }
    }
}

/// A request, as far as the tree is concerned.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// The method's number.
    pub method: u8,
    /// The number of the route's name.
    pub route: u32,
    /// Who answered.
    pub arm: Arm,
    /// How it went.
    pub seen: Seen,
}

impl Request {
    /// Whether its answer says that there is something: nobody answers 200 for what is not there, but for a few who always do.
    fn proves(&self) -> bool {
        // What is refused for other reasons than itself, and what nobody answered, says nothing of what is there.
        let silent = matches!(self.seen.status, 0 | 400 | 404 | 405 | 410 | 429 | 501..=504);
        self.arm != Arm::Gateway && !self.seen.aborted && !silent
    }
}

impl Tree {
    /// Takes in a request; its path in its matched form, without the leading `/`.
    pub fn take(&mut self, path: &str, request: Request) {
        self.taken += 1;
        self.make_room();
        let proves = request.proves();
        let terms = Terms { proves, room: self.has_room(), proven: self.proven };
        let mut node = &mut self.root;
        node.hits = node.hits.saturating_add(1);
        for segment in segments(path) {
            let Some(next) = node.step(segment, terms, &mut self.sums) else {
                let count = if proves { &mut self.beyond } else { &mut self.unmatched };
                *count += 1;
                return;
            };
            node = next;
            node.hits = node.hits.saturating_add(1);
        }
        let full = self.sums.rows >= ROWS || node.rows.len() >= ROWS_HERE;
        match node.row(request.method, request.route) {
            Some(row) => row.take(request.arm, request.seen),
            None if !proves => self.unmatched += 1,
            None if full => self.beyond += 1,
            None => {
                let mut row = Row { method: request.method, route: request.route, ..Row::default() };
                row.take(request.arm, request.seen);
                node.rows.push(row);
                self.sums.rows += 1;
            }
        }
    }

    /// Makes sure that a template is there, and stays.
    pub fn pin(&mut self, steps: &[Step]) {
        self.make_room();
        let _ = self.make(steps, true);
    }

    /// Adds what is known of a template elsewhere.
    pub fn add(&mut self, steps: &[Step], mut row: Row) {
        self.make_room();
        let requests = row.requests();
        let pin = row.documented && self.documented < DOCUMENTED;
        if row.documented && !pin {
            row.documented = false;
            if requests == 0 {
                self.beyond += 1;
                return;
            }
        }
        let full = self.sums.rows >= ROWS;
        let Some(node) = self.make(steps, pin) else {
            self.beyond = self.beyond.saturating_add(requests);
            return;
        };
        let documented = row.documented;
        let full = full || node.rows.len() >= ROWS_HERE;
        let known = node.row(row.method, row.route);
        let new = documented && known.as_ref().is_none_or(|known| !known.documented);
        match known {
            Some(known) => known.merge(&row),
            None if full => {
                self.beyond = self.beyond.saturating_add(requests);
                return;
            }
            None => {
                node.rows.push(row);
                self.sums.rows += 1;
            }
        }
        self.documented += usize::from(new);
        // Who goes by such names again has them proven.
        let hits = u32::try_from(requests).unwrap_or(u32::MAX);
        self.hit(steps, hits);
    }

    fn hit(&mut self, steps: &[Step], hits: u32) {
        let mut node = &mut self.root;
        node.hits = node.hits.saturating_add(hits);
        for step in steps.iter().take(DEPTH) {
            let next = match step {
                Step::Literal(name) if node.literals.contains_key(&**name) => node.literals.get_mut(&**name),
                _ => node.param.as_deref_mut(),
            };
            let Some(next) = next else { return };
            node = next;
            node.hits = node.hits.saturating_add(hits);
        }
    }

    fn has_room(&self) -> bool {
        self.sums.nodes + DEPTH < NODES
    }

    fn make(&mut self, steps: &[Step], pin: bool) -> Option<&mut Node> {
        let pin = pin && self.pinned + DEPTH < PINNED;
        let room = self.has_room();
        let (mut node, sums) = (&mut self.root, &mut self.sums);
        for step in steps.iter().take(DEPTH) {
            node = match step {
                // What only looks like a value, or stands where somebody says that values stand, is one.
                Step::Literal(name)
                    if !pin && !node.literals.contains_key(&**name) && (node.open || kind(name) == Kind::Id) =>
                {
                    node.value(kind(name), room, sums)?
                }
                Step::Literal(name) => {
                    let limit = kind(name).limit();
                    if !node.literals.contains_key(&**name) {
                        if !room {
                            return None;
                        }
                        sums.nodes += 1;
                        if let Some((n, _)) = limit {
                            node.kinds[n] = node.kinds[n].saturating_add(1);
                        }
                        node.literals.insert(name.as_str().into(), Node::default());
                    }
                    let child = node.literals.get_mut(&**name)?;
                    if pin && !child.pinned {
                        if let Some((n, _)) = limit {
                            node.kinds[n] = node.kinds[n].saturating_sub(1);
                        }
                        child.pinned = true;
                        self.pinned += 1;
                    }
                    child
                }
                Step::Open(name) => {
                    node.value(Kind::Slug, room, sums)?;
                    match (name.as_str(), &node.label) {
                        ("slug", _) | ("id", Label::Named(_)) => {}
                        ("id", _) => node.label = Label::Id,
                        (name, _) => node.label = Label::Named(name.into()),
                    }
                    if pin && !node.open {
                        // Names that were learned before anybody said so are values, too.
                        node.open = true;
                        node.join(None, u32::MAX, sums);
                    }
                    node.param.as_deref_mut()?
                }
            };
        }
        Some(node)
    }

    /// Makes room: names that hardly anybody asks for become values, and more and more of them until there is some.
    fn make_room(&mut self) {
        if (self.has_room() && self.sums.rows < ROWS) || self.taken < self.squeezed {
            return;
        }
        self.squeezed = self.taken + SQUEEZES;
        // What must stay is not what there is too much of.
        let [nodes, rows] = [(NODES - self.pinned) / 2 + self.pinned, (ROWS - self.documented) / 2 + self.documented];
        let mut proven = PROVEN;
        while proven < u32::MAX {
            self.root.join_unproven(proven, &mut self.sums);
            if self.sums.nodes <= nodes && self.sums.rows <= rows {
                break;
            }
            proven = proven.saturating_mul(2);
        }
        // Until the next time, names need half of what they needed now.
        self.proven = (proven / 2).max(PROVEN);
    }

    /// Calls back for each row, with its template.
    pub fn each<'t>(&'t self, mut visit: impl FnMut(&[Step], &'t Row)) {
        self.root.each(&mut Vec::new(), &mut visit);
    }

    /// How many nodes and rows there are.
    pub fn size(&self) -> (usize, usize) {
        (self.sums.nodes, self.sums.rows)
    }
}

/// What a request may change.
#[derive(Clone, Copy)]
struct Terms {
    /// Whether it proves that there is something.
    proves: bool,
    /// Whether there is room for it.
    room: bool,
    /// Requests that a name among many needs to keep it.
    proven: u32,
}

/// The segments of a path in its matched form: as many as are told apart.
fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|segment| !segment.is_empty()).take(DEPTH)
}

impl Node {
    fn row(&mut self, method: u8, route: u32) -> Option<&mut Row> {
        self.rows.iter_mut().find(|row| row.method == method && row.route == route)
    }

    /// The node of the next segment, made where there is none and the request proves that there is something.
    fn step(&mut self, segment: &str, terms: Terms, sums: &mut Sums) -> Option<&mut Self> {
        // Looked up twice, since a reference that is given back at once would be held to the end.
        if self.literals.contains_key(segment) {
            return self.literals.get_mut(segment);
        }
        let kind = kind(segment);
        let named = match kind.limit() {
            Some((n, limit)) if !self.open && self.is_name(n, limit, segment, terms, sums) => Some(n),
            _ => None,
        };
        match named {
            Some(n) if terms.proves && terms.room => {
                self.kinds[n] = self.kinds[n].saturating_add(1);
                sums.nodes += 1;
                Some(self.literals.entry(segment.into()).or_default())
            }
            // Nothing says that it is a name: whatever stands here has it.
            Some(_) if !terms.proves => self.param.as_deref_mut().filter(|_| self.wide.is_some()),
            _ => self.value(kind, terms.proves && terms.room, sums),
        }
    }

    /// The node of values, made where there is none and it may be.
    fn value(&mut self, kind: Kind, make: bool, sums: &mut Sums) -> Option<&mut Self> {
        if self.param.is_none() {
            if !make {
                return None;
            }
            sums.nodes += 1;
        }
        if kind == Kind::Id && self.label == Label::Slug {
            self.label = Label::Id;
        }
        Some(self.param.get_or_insert_default())
    }

    /// Whether a segment that has no name here should get one.
    fn is_name(&mut self, n: usize, limit: u16, segment: &str, terms: Terms, sums: &mut Sums) -> bool {
        if let Some(wide) = self.wide.as_mut().filter(|wide| wide.joined[n]) {
            if wide.values[n] || !terms.proves || !wide.watch(segment, &mut sums.watched) {
                return false;
            }
            if self.kinds[n] < limit.saturating_mul(2) {
                return true;
            }
            // So many of them are asked for often that they are values.
            wide.values[n] = true;
            self.join(Some(n), u32::MAX, sums);
            return false;
        }
        if self.kinds[n] < limit || !terms.proves {
            return true;
        }
        let (mut all, mut unproven) = (0_u16, 0_u16);
        for (name, child) in self.literals.iter().filter(|(_, child)| !child.pinned) {
            if kind(name).limit().is_some_and(|(kind, _)| kind == n) {
                all += 1;
                unproven += u16::from(child.hits < terms.proven);
            }
        }
        // They are asked for again and again: names, of which there are many.
        if unproven < all / 2 && all < limit.saturating_mul(STRETCH) {
            return true;
        }
        self.wide.get_or_insert_default().joined[n] = true;
        self.join(Some(n), terms.proven, sums);
        false
    }

    /// Makes values of names that were asked for less often than this, of one kind or of all.
    fn join(&mut self, kind: Option<usize>, proven: u32, sums: &mut Sums) {
        let joins = |name: &str, child: &mut Self| {
            !child.pinned
                && child.hits < proven
                && self::kind(name).limit().is_some_and(|(n, _)| kind.is_none_or(|kind| kind == n))
        };
        let joined: Vec<(Box<str>, Self)> = self.literals.extract_if(|name, child| joins(name, child)).collect();
        if joined.is_empty() {
            return;
        }
        self.literals.shrink_to_fit();
        for (name, child) in joined {
            if let Some((n, _)) = self::kind(&name).limit() {
                self.kinds[n] = self.kinds[n].saturating_sub(1);
                self.wide.get_or_insert_default().joined[n] = true;
            }
            self.absorb_value(child, sums);
        }
    }

    /// The same all the way down.
    fn join_unproven(&mut self, proven: u32, sums: &mut Sums) {
        self.join(None, proven, sums);
        for child in self.literals.values_mut().chain(self.param.as_deref_mut()) {
            child.join_unproven(proven, sums);
        }
    }

    /// Takes over what another node has.
    fn absorb(&mut self, other: Self, sums: &mut Sums) {
        self.hits = self.hits.saturating_add(other.hits);
        sums.watched -= other.wide.as_ref().map_or(0, |wide| wide.watched.len());
        for row in other.rows {
            let room = self.rows.len() < ROWS_HERE;
            match self.row(row.method, row.route) {
                Some(known) => known.merge(&row),
                None if room => {
                    self.rows.push(row);
                    continue;
                }
                None => {}
            }
            sums.rows -= 1;
        }
        for (name, child) in other.literals {
            // What was one of too many there is one of too many here.
            let limit = kind(&name).limit();
            let value = self.open || limit.is_none_or(|(n, _)| self.wide.as_ref().is_some_and(|wide| wide.joined[n]));
            if let Some(known) = self.literals.get_mut(&name) {
                sums.nodes -= 1;
                known.absorb(child, sums);
            } else if value && !child.pinned {
                self.absorb_value(child, sums);
            } else {
                if let (false, Some((n, _))) = (child.pinned, limit) {
                    self.kinds[n] = self.kinds[n].saturating_add(1);
                }
                self.literals.insert(name, child);
                match limit {
                    Some((n, limit)) if self.kinds[n] > limit.saturating_mul(STRETCH) => {
                        self.join(Some(n), u32::MAX, sums);
                    }
                    _ => {}
                }
            }
        }
        if let Some(param) = other.param {
            if other.label != Label::Slug && self.label == Label::Slug {
                self.label = other.label;
            }
            self.absorb_value(*param, sums);
        }
    }

    fn absorb_value(&mut self, child: Self, sums: &mut Sums) {
        match &mut self.param {
            Some(param) => {
                sums.nodes -= 1;
                param.absorb(child, sums);
            }
            None => self.param = Some(Box::new(child)),
        }
    }

    fn each<'t>(&'t self, steps: &mut Vec<Step>, visit: &mut impl FnMut(&[Step], &'t Row)) {
        for row in &self.rows {
            visit(steps, row);
        }
        let mut names: Vec<_> = self.literals.iter().collect();
        names.sort_by(|a, b| a.0.cmp(b.0));
        for (name, child) in names {
            steps.push(Step::Literal(name.to_string()));
            child.each(steps, visit);
            steps.pop();
        }
        if let Some(param) = &self.param {
            let name = match &self.label {
                Label::Slug => "slug",
                Label::Id => "id",
                Label::Named(name) => name,
            };
            steps.push(Step::Open(name.to_owned()));
            param.each(steps, visit);
            steps.pop();
        }
    }
}

/// A template as text. Segments that are not plain are escaped, so that none looks like an open one.
pub fn template(steps: &[Step]) -> String {
    if steps.is_empty() {
        return "/".to_owned();
    }
    let mut out = String::new();
    for step in steps {
        out.push('/');
        match step {
            Step::Open(name) => {
                out.push('{');
                out.push_str(name);
                out.push('}');
            }
            Step::Literal(name) => {
                for byte in name.bytes() {
                    // RFC 3986: what a segment may have.
                    if byte.is_ascii_alphanumeric() || b"-._~!$&'()+,;=:@".contains(&byte) {
                        out.push(char::from(byte));
                    } else {
                        out.push_str(&format!("%{byte:02X}"));
                    }
                }
            }
        }
    }
    out
}

/// A template from its text, as `template` writes it and OpenAPI has it.
pub fn steps(template: &str, case_insensitive: bool) -> Vec<Step> {
    let mut steps = Vec::new();
    for segment in template.split('/').filter(|segment| !segment.is_empty() && *segment != "**").take(DEPTH) {
        match segment.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) {
            Some(name) if is_name(name) => steps.push(Step::Open(name.to_owned())),
            Some(_) => steps.push(Step::Open("id".to_owned())),
            // As RFC 6570 and OpenAPI allow parts of a segment: `/report.{format}`.
            None if segment.contains('{') => steps.push(Step::Open("id".to_owned())),
            None => {
                // What no file may name can be there all the same, where it is let through.
                let key = literal_segment(segment, case_insensitive).unwrap_or_else(|_| decode(segment).into_owned());
                steps.push(Step::Literal(String::from_utf8_lossy(&key).into_owned()));
            }
        }
    }
    steps
}

fn is_name(name: &str) -> bool {
    (1..=40).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}
