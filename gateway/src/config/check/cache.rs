//! Where answers are kept, and for how long.

use std::time::Duration;

use crate::config::{
    cache::RouteCacheConfig,
    source::{At, Sources},
    values::Size,
};

pub(super) fn check_cache(sources: &mut Sources) {
    let cache = sources.file.cache.clone();
    let at = At::root(0).down("cache");
    let memory = (1 << 20..=1 << 40).contains(&cache.memory.0);
    if !memory {
        let help = "from `1MiB` to `1024GiB`; a route without `cache:` keeps nothing";
        sources.error(&at.down("memory"), format!("size out of bounds: `{}`", cache.memory), help);
    }
    let most = cache.memory.0 / 8;
    if memory && (cache.max_object.0 == 0 || sources.has(&at.down("max_object")) && cache.max_object.0 > most) {
        let help = format!("from `1B` to an eighth of `memory`, `{}`", Size(most));
        sources.error(&at.down("max_object"), format!("size out of bounds: `{}`", cache.max_object), &help);
    }
    if let Some(url) = &cache.redis
        && !is_redis(url)
    {
        let help = "write it like `redis://127.0.0.1:6379/0` or `redis://:PASSWORD@host`";
        sources.error(&at.down("redis"), "not the URL of a Redis".to_owned(), help);
    }
    let timeout = cache.redis_timeout.0;
    if !(Duration::from_millis(1)..=Duration::from_secs(1)).contains(&timeout) {
        let help = "from `1ms` to `1s`: requests wait for it";
        sources.error(&at.down("redis_timeout"), format!("limit out of bounds: `{}`", cache.redis_timeout), help);
    }
}

fn is_redis(url: &str) -> bool {
    redis::IntoConnectionInfo::into_connection_info(url).is_ok() && url.starts_with("redis://")
}

pub(super) fn check_route_cache(sources: &mut Sources, at: &At, cache: &RouteCacheConfig) {
    let collapse = cache.collapse.0;
    if collapse > Duration::from_mins(5) {
        let help = "`5m` at most; `0s` waits for nobody";
        sources.error(&at.down("collapse"), format!("limit out of bounds: `{}`", cache.collapse), help);
    }
}
