-- Comments.

-- A remark is on something that is there, an answer on the same thing as what it answers, and both go with it.
CREATE OR REPLACE FUNCTION on_comment_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.entity_type = 'bead' THEN
        PERFORM 1 FROM beads WHERE id = NEW.entity_id FOR KEY SHARE;
    ELSE
        PERFORM 1 FROM projects WHERE id = NEW.entity_id FOR KEY SHARE;
    END IF;
    IF NOT FOUND THEN
        PERFORM raise_unknown(NEW.entity_type || '_id', NEW.entity_id);
    END IF;
    IF NEW.parent_id IS NOT NULL AND NOT EXISTS (
        SELECT 1 FROM comments
         WHERE id = NEW.parent_id AND (entity_type, entity_id) = (NEW.entity_type, NEW.entity_id)) THEN
        PERFORM raise_unknown('parent_id', NEW.parent_id);
    END IF;
    RETURN NEW;
END $$;
DROP TRIGGER IF EXISTS a_comment_inserted ON comments;
CREATE TRIGGER a_comment_inserted BEFORE INSERT ON comments FOR EACH ROW WHEN (NOT importing())
    EXECUTE FUNCTION on_comment_inserted();

CREATE OR REPLACE FUNCTION on_commented_deleted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM comments WHERE entity_type = TG_ARGV[0] AND entity_id = OLD.id;
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS project_deleted_with_comments ON projects;
CREATE TRIGGER project_deleted_with_comments AFTER DELETE ON projects FOR EACH ROW
    EXECUTE FUNCTION on_commented_deleted('project');
DROP TRIGGER IF EXISTS bead_deleted_with_comments ON beads;
CREATE TRIGGER bead_deleted_with_comments AFTER DELETE ON beads FOR EACH ROW
    EXECUTE FUNCTION on_commented_deleted('bead');
