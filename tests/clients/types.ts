// What tests/cluster/test_generated_clients.py runs with the types that openapi-typescript makes.
import type { components, paths } from "./schema";

declare const process: { env: Record<string, string | undefined>; exit(status: number): never };

type Schemas = components["schemas"];
type Conflict = paths["/api/v1/locks/{name}"]["post"]["responses"][409]["content"]["application/problem+json"];

async function call<T>(method: string, path: string, body?: unknown): Promise<T> {
    const answer = await fetch(process.env.LOOM_URL + path, { method, body: body ? JSON.stringify(body) : undefined });
    return (await answer.json()) as T;
}

async function main(): Promise<void> {
    const lock: Schemas["AcquireLock"] = { owner: "a", ttl_seconds: 30, wait_seconds: 0, metadata: { why: [1] } };
    const grant = await call<Schemas["Grant"]>("POST", "/api/v1/locks/build", lock);
    const why: unknown = grant.metadata["why"];
    const conflict = await call<Conflict>("POST", "/api/v1/locks/build", { owner: "b" });
    if (conflict.type !== "/problems/lock-held" || conflict.holder?.owner !== "a" || !why) throw new Error("lock");

    const provider: Schemas["CreateProvider"] = { id: "local", name: "Local", attributes: { region: "eu" } };
    await call<Schemas["Provider"]>("POST", "/api/v1/providers", provider);
    const project: Schemas["CreateProject"] = { id: "p", name: "p", git_repo: "r", branch: "main" };
    await call<Schemas["Project"]>("POST", "/api/v1/projects", project);
    const agent: Schemas["CreateAgent"] = { id: "a", persona_name: "coder", project_id: "p" };
    await call<Schemas["Agent"]>("POST", "/api/v1/agents", agent);
    const bead: Schemas["CreateBead"] = { id: "x", title: "x", project_id: "p", context: { branch: "fix" } };
    await call<Schemas["Bead"]>("POST", "/api/v1/beads", bead);
    const claim = await call<Schemas["Claim"]>("POST", "/api/v1/beads/claim", { agent_id: "a" });
    console.log("claimed", claim.bead.id);

    const page = await call<Schemas["EventPage"]>("GET", "/api/v1/events?after=0");
    const last: Schemas["Event"]["type"] = "bead.assigned";
    if (page.events.at(-1)!.type !== last) throw new Error("events");
}

main().catch((error) => {
    console.error(error);
    process.exit(1);
});
