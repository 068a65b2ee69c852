-- What kine 0.14.12 has made of 24 writes and a compaction: the schema and the rows of its state.db.
BEGIN TRANSACTION;
CREATE TABLE kine
			(
				id INTEGER PRIMARY KEY AUTOINCREMENT,
				name INTEGER,
				created INTEGER,
				deleted INTEGER,
				create_revision INTEGER,
				prev_revision INTEGER,
				lease INTEGER,
				value BLOB,
				old_value BLOB
			);
INSERT INTO "kine" VALUES(1,'compact_rev_key',1,0,0,16,0,X'',NULL);
INSERT INTO "kine" VALUES(2,'/registry/health',1,0,0,0,0,X'7B226865616C7468223A2274727565227D',NULL);
INSERT INTO "kine" VALUES(3,'/registry/configmaps/default/kept',1,0,0,0,0,X'6B657074',NULL);
INSERT INTO "kine" VALUES(16,'/registry/configmaps/default/changed',0,0,4,15,0,X'3132',X'3131');
INSERT INTO "kine" VALUES(17,'/registry/configmaps/default/changed',0,0,4,16,0,X'3133',X'3132');
INSERT INTO "kine" VALUES(18,'/registry/configmaps/default/changed',0,0,4,17,0,X'3134',X'3133');
INSERT INTO "kine" VALUES(19,'/registry/configmaps/default/changed',0,0,4,18,0,X'3135',X'3134');
INSERT INTO "kine" VALUES(20,'/registry/configmaps/default/changed',0,0,4,19,0,X'3136',X'3135');
INSERT INTO "kine" VALUES(21,'/registry/configmaps/default/changed',0,0,4,20,0,X'3137',X'3136');
INSERT INTO "kine" VALUES(22,'/registry/configmaps/default/changed',0,0,4,21,0,X'3138',X'3137');
INSERT INTO "kine" VALUES(23,'/registry/configmaps/default/changed',0,0,4,22,0,X'3139',X'3138');
INSERT INTO "kine" VALUES(24,'/registry/configmaps/default/deleted',1,0,0,0,0,X'78',NULL);
INSERT INTO "kine" VALUES(25,'/registry/configmaps/default/deleted',0,1,24,24,0,X'78',X'78');
INSERT INTO "kine" VALUES(26,'/registry/events/default/leased',1,0,0,0,3600,X'78',NULL);
CREATE INDEX kine_name_index ON kine (name);
CREATE INDEX kine_name_id_index ON kine (name,id);
CREATE INDEX kine_id_deleted_index ON kine (id,deleted);
CREATE INDEX kine_prev_revision_index ON kine (prev_revision);
CREATE UNIQUE INDEX kine_name_prev_revision_uindex ON kine (name, prev_revision);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('kine',26);
COMMIT;
